// The host as a backend: runs programs in one parallel region. And the public calls that use it.
#include "cpu/run.hpp"

#include <cstring>
#include <functional>
#include <memory>
#include <new>

#include "adamax/adamax.hpp"
#include "core/fp_mode.hpp"
#include "core/low_state.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/parallel.hpp"
#include "cpu/sums.hpp"
#include "cpu/wait.hpp"
#include "cpu/work.hpp"

namespace adamax {
namespace cpu {
namespace {

constexpr std::int64_t kMoreThanCaches = 64 * 1024 * 1024;  // bytes read by a call

// What a row reads, for the number of threads: four streams, or the gradient alone. Smaller ones
// count as much, because they are no less work.
std::int64_t bytes_read(const Row& row) {
  const std::size_t bytes = row.operation == Operation::kNone
                                ? itemsize(row.grad_dtype())
                                : 4 * itemsize(compute_dtype(row.param_dtype()));
  return row.size * static_cast<std::int64_t>(bytes);
}

// Null where there is nothing to do.
Kernel kernel_for(const KernelTable& table, const Row& row) {
  switch (row.operation) {
    case Operation::kNone:
      return nullptr;
    case Operation::kUpdate:
      return table
          .update[row.storage][row.memory.average != nullptr][row.memory.accumulator != nullptr];
    case Operation::kAccumulate:
      return table.accumulate[static_cast<int>(row.grad_dtype())];
    case Operation::kAverage:
      return table.average[static_cast<int>(row.param_dtype())][row.memory.remainder != nullptr];
  }
  __builtin_unreachable();
}

// Elements of a piece before its state lies at the begin of a cache line, which a vector then does
// not straddle; nor does one of another stream that begins at the same place in a line, as state of
// our own does. Not worth a loop of its own for few.
std::int64_t head_of(const Row& row, const Piece& piece) {
  constexpr std::int64_t kLeast = 8192;
  constexpr std::size_t kCacheLine = 64;
  if (piece.end - piece.begin < kLeast || !is_plain(storage_at(row.storage))) return 0;
  const Arrays& memory = row.memory;
  const void* const state = row.operation == Operation::kUpdate    ? memory.momentum
                            : row.operation == Operation::kAverage ? memory.average
                                                                   : memory.accumulator;
  const std::size_t size = itemsize(compute_dtype(row.param_dtype()));
  const auto first = reinterpret_cast<std::uintptr_t>(state) + piece.begin * size;
  return static_cast<std::int64_t>(-first % kCacheLine / size);
}

// When nobody reads them any more.
void decay_variable_scales(const Program& program) {
  if (!program.has_16_bits) return;
  const FloatingPointMode ieee;
  for (const Row& row : program.rows) {
    if (row.operation != Operation::kUpdate ||
        storage_at(row.storage).state != StateFormat::k16Bits) {
      continue;
    }
    const auto scale = scalar::F32::load(row.memory.norm_scale);
    const auto beta_2 = static_cast<float>(program.groups[row.group].beta_2);
    scalar::F32(next_variable_scale(scale.v, beta_2)).store(row.memory.norm_scale);
  }
}

Outcome run(const Queue&, const Workspace& workspace, const Program& program) {
  if (program.has_device_scalars()) {
    throw std::invalid_argument(
        "the variables are in host memory and the call takes numbers from the memory of a GPU; "
        "expected the numbers themselves");
  }
  const KernelTable& table = active_table();
  const Work work(program.rows);
  Sums sums(program, workspace.memory);
  std::int64_t bytes = 0;
  for (const Row& row : program.rows) bytes += bytes_read(row);
  const int threads = threads_for(bytes);
  const std::int64_t ahead = bytes < kMoreThanCaches ? kAheadInCaches : kAheadInMemory;
  Shares to_sum(work.chunks(), threads), to_do(work.chunks(), threads);
  std::atomic<int> entered{0};
  std::atomic<std::int64_t> unsummed{work.chunks()};
  std::atomic<std::uint32_t> is_summing{program.has_sums()};

  const auto finish_sums = [&] {
    sums.finish();
    is_summing.store(0);  // in sequence with the look at who waits, in the next line
    is_summing.notify_all();
  };
  if (program.has_sums() && work.chunks() == 0) finish_sums();
  const auto work_of_thread = [&] {
    const int thread = entered.fetch_add(1, std::memory_order_relaxed);
    if (program.has_sums()) {
      to_sum.take(thread, [&](std::int64_t chunk) {
        for (const Piece& piece : work.chunk(chunk)) sums.add(table, piece);
        if (unsummed.fetch_sub(1, std::memory_order_acq_rel) == 1) finish_sums();
      });
      wait_while(is_summing, 1);
      if (!sums.outcome().is_finite) return;
    }
    to_do.take(thread, [&](std::int64_t chunk) {
      for (const Piece& piece : work.chunk(chunk)) {
        const Row& row = program.rows[piece.row];
        const Kernel kernel = kernel_for(table, row);
        if (kernel == nullptr) continue;
        const auto work_on = [&](std::int64_t begin, std::int64_t end) {
          kernel(row.memory, program.groups[row.group],
                 {begin, end, sums.clip(piece.row), ahead, row.number, row.first_element});
        };
        const std::int64_t aligned = piece.begin + head_of(row, piece);
        if (aligned > piece.begin) work_on(piece.begin, aligned);
        work_on(aligned, piece.end);
      }
    });
  };
  // By reference: without a copy on the heap.
  run_parallel(threads, std::ref(work_of_thread));
  if (sums.outcome().is_finite) decay_variable_scales(program);
  return sums.outcome();
}

Outcome run_with_own_scratch(const Program& program) {
  std::unique_ptr<double[]> scratch;
  const std::size_t bytes = Sums::scratch_bytes(program);
  if (bytes > 0) scratch = std::make_unique_for_overwrite<double[]>(bytes / sizeof(double));
  return run({}, {scratch.get(), bytes}, program);
}

}  // namespace

const Backend& backend() {
  static constexpr Backend kBackend = {
      .require_usable = [](int) {},
      .device_of = [](const void*) { return kHost; },
      .allocate = [](int, std::size_t bytes) { return Workspace{::operator new(bytes), bytes}; },
      .deallocate = [](int, const Workspace& workspace) { ::operator delete(workspace.memory); },
      .scratch_bytes = Sums::scratch_bytes,
      .run = run,
      .copy = [](const Queue&, void* to, const void* from,
                 std::size_t bytes) { std::memmove(to, from, bytes); },
      .synchronize = [](const Queue&) {},
  };
  return kBackend;
}

}  // namespace cpu

bool step(std::span<const Variable> variables, std::span<const Group> groups, const Call& call) {
  return cpu::run_with_own_scratch(make_program(variables, groups, call)).is_finite;
}

double global_norm(std::span<const ConstBuffer> buffers) {
  return cpu::run_with_own_scratch(make_norm_program(buffers)).norm;
}

}  // namespace adamax
