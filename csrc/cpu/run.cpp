// The host as a backend: runs programs in one parallel region. And the public calls that use it.
#include "cpu/run.hpp"

#include <cstring>
#include <functional>
#include <memory>
#include <new>

#include "adamax/adamax.hpp"
#include "core/fp_mode.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/parallel.hpp"
#include "cpu/sums.hpp"
#include "cpu/work.hpp"

namespace adamax {
namespace cpu {
namespace {

// What a row reads, for the number of threads: four streams, or the gradient alone.
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
      return table.average[static_cast<int>(row.param_dtype())];
  }
  __builtin_unreachable();
}

Outcome run(const Queue&, const Workspace& workspace, const Program& program) {
  const KernelTable& table = active_table();
  const Work work(program.rows);
  Sums sums(program, workspace.memory);
  std::atomic<std::int64_t> next_sum{0}, next_operation{0};
  std::int64_t bytes = 0;
  for (const Row& row : program.rows) bytes += bytes_read(row);

  const auto work_of_thread = [&](const Team& team) {
    if (program.has_sums()) {
      team.share(next_sum, work.chunks(), [&](std::int64_t chunk) {
        for (const Piece& piece : work.chunk(chunk)) sums.add(table, piece);
      });
      team.barrier();
      if (team.is_first()) sums.finish();
      team.barrier();
      if (!sums.outcome().is_finite) return;
    }
    team.share(next_operation, work.chunks(), [&](std::int64_t chunk) {
      for (const Piece& piece : work.chunk(chunk)) {
        const Row& row = program.rows[piece.row];
        if (const Kernel kernel = kernel_for(table, row)) {
          kernel(row.memory, piece.begin, piece.end, program.groups[row.group],
                 sums.clip(piece.row));
        }
      }
    });
  };
  // By reference: without a copy on the heap.
  run_parallel(threads_for(bytes), std::ref(work_of_thread));
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
