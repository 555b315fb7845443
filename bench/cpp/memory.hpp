// The memory that a benchmark works on: variables with all their streams, filled with usual values.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "adamax/adamax.hpp"
#include "bound.hpp"

namespace adamax_bench {

struct Streams {
  adamax::Storage storage = adamax::storage_at(0);  // all float32
  bool average = false;
  bool accumulator = false;
};

// One block for each stream, cut into variables one after another, as a training program has them.
class Memory {
 public:
  Memory(std::span<const std::int64_t> sizes, const Streams& streams);

  std::span<const adamax::Variable> variables() const { return variables_; }
  std::int64_t elements() const { return elements_; }

  // The streams of a step on everything as one array; of the norm; of a micro-batch.
  std::vector<bound_stream> step_streams() const;
  std::vector<bound_stream> norm_streams() const;
  std::vector<bound_stream> accumulate_streams() const;

  // Sets the state and the gradients, for the benchmarks of special values.
  void fill_state(double momentum, double norm);
  void fill_gradients(double value);

 private:
  struct Block {
    adamax::DType dtype;
    std::unique_ptr<void, decltype(&std::free)> data{nullptr, std::free};
    void allocate(adamax::DType dtype, std::int64_t elements);
    void fill(std::int64_t elements, double low, double high);
    bound_stream stream(bool written) const;
  };

  std::int64_t elements_ = 0;
  Block param_, grad_, momentum_, norm_, average_, accumulator_, remainder_;
  std::vector<float> norm_scale_;
  std::vector<adamax::Variable> variables_;
};

}  // namespace adamax_bench
