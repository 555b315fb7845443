// The step: cuts all variables into work of even size and runs the kernels in one parallel region.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "adamax/adamax.hpp"
#include "core/step_rules.hpp"
#include "core/step_scalars.hpp"
#include "core/update_rule.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/fp_mode.hpp"
#include "cpu/norms.hpp"
#include "cpu/parallel.hpp"

namespace adamax {
namespace cpu {
namespace {

// Elements that a thread takes at a time: large enough that taking is free, small enough to even
// out threads of unequal speed. A multiple of kBlock.
constexpr std::int64_t kChunk = 16 * kBlock;

struct Piece {
  std::int64_t variable, begin, end;
};

// Pieces of variables in order, grouped into chunks of about kChunk elements: large variables are
// cut, small ones share a chunk. The cuts do not depend on the number of threads.
class Work {
 public:
  template <class SizeOf>
  Work(std::int64_t variables, const SizeOf& size_of) {
    std::int64_t in_chunk = 0;
    pieces_.reserve(variables);
    for (std::int64_t i = 0; i < variables; ++i) {
      const std::int64_t size = size_of(i);
      for (std::int64_t begin = 0; begin < size; begin += kChunk) {
        const std::int64_t end = std::min(begin + kChunk, size);
        if (in_chunk == 0) chunk_starts_.push_back(pieces_.size());
        pieces_.push_back({i, begin, end});
        in_chunk += end - begin;
        if (in_chunk >= kChunk) in_chunk = 0;
      }
    }
    chunk_starts_.push_back(pieces_.size());
  }

  std::int64_t chunks() const { return static_cast<std::int64_t>(chunk_starts_.size()) - 1; }
  std::span<const Piece> chunk(std::int64_t i) const {
    return std::span(pieces_).subspan(chunk_starts_[i], chunk_starts_[i + 1] - chunk_starts_[i]);
  }

 private:
  std::vector<Piece> pieces_;
  std::vector<std::size_t> chunk_starts_;
};

Streams streams_of(const Variable& v) {
  return {v.param, v.grad, v.momentum, v.norm, v.average, v.accumulator};
}

// One call of step(), checked and laid out before anything is written.
class Step {
 public:
  Step(std::span<const Variable> variables, const Hyperparameters& h, const Call& call)
      : variables_(variables),
        hyperparameters_(h),
        call_(call),
        scalars_(make_step_scalars(h, call)),
        work_(static_cast<std::int64_t>(variables.size()),
              [&](std::int64_t i) { return variables[i].size; }) {
    pairs_.reserve(variables.size());
    for (const Variable& v : variables) {
      pairs_.push_back(pair_index(v));
      require_memory(v, h, call);
      traffic_ += v.size * static_cast<std::int64_t>(4 * itemsize(compute_dtype(v.param_dtype)));
    }
    if (clips_by_norm(hyperparameters_, call_) || call.require_finite) {
      first_block_.reserve(variables.size());
      std::int64_t blocks = 0;
      for (const Variable& v : variables) {
        first_block_.push_back(blocks);
        blocks += num_blocks(v.size);
      }
      block_sums_.resize(blocks);
      sums_of_squares_.resize(variables.size());
      clips_.resize(variables.size(), 1.0);
    }
  }

  bool run() {
    run_parallel(threads_for(traffic_), [this](const Team& team) {
      if (call_.require_finite) {
        // What was accumulated is finite already; the gradient alone is looked at, and as it is: a
        // scale above 1 could make a finite one infinite.
        StepScalars scalars = scalars_;
        scalars.grad_scale = std::min(scalars.grad_scale, 1.0);
        sum_squares(team, finite_next_, scalars, /*averaged=*/false);
        if (team.is_first()) check_finite();
        team.barrier();
        if (!is_finite_) return;
      }
      if (clips_by_norm(hyperparameters_, call_)) {
        // One pass serves both, where both look at the same numbers.
        if (!call_.require_finite || averages_micro_batches(hyperparameters_) ||
            scalars_.grad_scale > 1.0) {
          sum_squares(team, norm_next_, scalars_, averages_micro_batches(hyperparameters_));
        }
        if (team.is_first()) {
          clip_coefficients(hyperparameters_, variables_, sums_of_squares_, clips_);
        }
        team.barrier();
      }
      team.share(update_next_, work_.chunks(), [this](std::int64_t chunk) {
        for (const Piece& piece : work_.chunk(chunk)) update(piece);
      });
    });
    return is_finite_;
  }

 private:
  // Fills sums_of_squares_; every thread of the team calls this.
  void sum_squares(const Team& team, std::atomic<std::int64_t>& next, const StepScalars& scalars,
                   bool averaged) {
    team.share(next, work_.chunks(), [&](std::int64_t chunk) {
      for (const Piece& piece : work_.chunk(chunk)) {
        const Variable& v = variables_[piece.variable];
        if (v.grad == nullptr) continue;
        Streams streams = streams_of(v);
        if (!averaged) streams.accumulator = nullptr;
        double* const sums =
            block_sums_.data() + first_block_[piece.variable] + piece.begin / kBlock;
        table_.squares[static_cast<int>(v.grad_dtype)](streams, piece.begin, piece.end, scalars,
                                                       sums);
      }
    });
    team.barrier();
    if (team.is_first()) {
      for (std::size_t i = 0; i < variables_.size(); ++i) {
        if (variables_[i].grad == nullptr) continue;
        sums_of_squares_[i] = fold_blocks(
            std::span(block_sums_).subspan(first_block_[i], num_blocks(variables_[i].size)));
      }
    }
  }

  void check_finite() {
    for (std::size_t i = 0; i < variables_.size(); ++i) {
      if (variables_[i].grad == nullptr || std::isfinite(sums_of_squares_[i])) continue;
      if (!only_sum_overflowed(variables_[i])) is_finite_ = false;
    }
  }

  void update(const Piece& piece) const {
    const Variable& v = variables_[piece.variable];
    const Streams streams = streams_of(v);
    if (call_.accumulate_only) {
      if (v.grad != nullptr) {
        table_.accumulate[static_cast<int>(v.grad_dtype)](streams, piece.begin, piece.end,
                                                          scalars_);
      }
    } else if (v.grad != nullptr) {
      table_.update[pairs_[piece.variable]][index_of(rule_of(v, hyperparameters_))](
          streams, piece.begin, piece.end, scalars_, clips_.empty() ? 1.0 : clips_[piece.variable]);
    } else if (v.average != nullptr) {
      table_.average[static_cast<int>(v.param_dtype)](streams, piece.begin, piece.end, scalars_);
    }
  }

  const KernelTable& table_ = active_table();
  const std::span<const Variable> variables_;
  const Hyperparameters& hyperparameters_;
  const Call& call_;
  const StepScalars scalars_;
  const Work work_;
  std::vector<int> pairs_;
  std::int64_t traffic_ = 0;  // bytes read, for the number of threads

  std::vector<std::int64_t> first_block_;  // of each variable, in block_sums_
  std::vector<double> block_sums_, sums_of_squares_, clips_;
  std::atomic<std::int64_t> finite_next_{0}, norm_next_{0}, update_next_{0};
  bool is_finite_ = true;
};

}  // namespace
}  // namespace cpu

bool step(std::span<const Variable> variables, const Hyperparameters& hyperparameters,
          const Call& call) {
  const cpu::FloatingPointMode ieee;
  return cpu::Step(variables, hyperparameters, call).run();
}

void overwrite_with_averages(std::span<const Variable> variables) {
  StepScalars scalars{};
  scalars.average_mode = AverageMode::kKeep;
  scalars.overwrite = true;
  const cpu::FloatingPointMode ieee;
  for (const Variable& v : variables) {
    if (v.average == nullptr) continue;
    cpu::active_table().average[static_cast<int>(v.param_dtype)](cpu::streams_of(v), 0, v.size,
                                                                 scalars);
  }
}

double global_norm(std::span<const ConstBuffer> buffers) {
  const cpu::FloatingPointMode ieee;
  const auto size_of = [&](std::int64_t i) { return buffers[i].size; };
  const cpu::Work work(static_cast<std::int64_t>(buffers.size()), size_of);
  std::vector<std::int64_t> first_block;
  std::int64_t blocks = 0, bytes = 0;
  for (const ConstBuffer& buffer : buffers) {
    first_block.push_back(blocks);
    blocks += num_blocks(buffer.size);
    bytes += buffer.size * static_cast<std::int64_t>(itemsize(buffer.dtype));
  }
  std::vector<double> sums(blocks);
  std::atomic<std::int64_t> next{0};
  const cpu::KernelTable& table = cpu::active_table();
  cpu::run_parallel(cpu::threads_for(bytes), [&](const cpu::Team& team) {
    team.share(next, work.chunks(), [&](std::int64_t chunk) {
      for (const cpu::Piece& piece : work.chunk(chunk)) {
        const ConstBuffer& buffer = buffers[piece.variable];
        const cpu::Streams streams{nullptr, buffer.data, nullptr, nullptr, nullptr, nullptr};
        table.squares[static_cast<int>(buffer.dtype)](
            streams, piece.begin, piece.end, StepScalars{},
            &sums[first_block[piece.variable] + piece.begin / kBlock]);
      }
    });
  });
  double total = 0.0;
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    total += cpu::fold_blocks(std::span(sums).subspan(first_block[i], num_blocks(buffers[i].size)));
  }
  return std::sqrt(total);
}

}  // namespace adamax
