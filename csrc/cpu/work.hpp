// How the rows of a program are cut into work of even size, and shared out among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "core/program.hpp"
#include "core/sum_shape.hpp"

namespace adamax::cpu {

// Elements that a thread takes at a time: large enough that taking is free, small enough to even
// out threads of unequal speed. A multiple of kBlock.
constexpr std::int64_t kChunk = 16 * kBlock;

struct Piece {
  std::size_t row;
  std::int64_t begin, end;
};

// Pieces of rows in order, grouped into chunks of about kChunk elements: large rows are cut, small
// ones share a chunk. The cuts do not depend on the number of threads.
class Work {
 public:
  explicit Work(std::span<const Row> rows) {
    std::int64_t in_chunk = 0;
    pieces_.reserve(rows.size());
    chunk_starts_.reserve(8);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      for (std::int64_t begin = 0; begin < rows[i].size; begin += kChunk) {
        const std::int64_t end = std::min(begin + kChunk, rows[i].size);
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

// Work items [0, count) for threads to share out: each thread takes a contiguous part in order, and
// then helps with the parts of others.
//
// Note [Parts]: neighbours from a single counter would do, too, but two threads that read memory
// side by side hinder each other: on Zen 5 that takes 15 % longer than two that are far apart.
class Shares {
 public:
  Shares(std::int64_t count, int threads)
      : count_(count),
        parts_(std::min(threads, kMaxParts)),
        per_part_((count + parts_ - 1) / parts_) {}

  // Calls work(i) for every item that no other thread has taken, from part `first` on.
  template <class Work>
  void take(int first, const Work& work) {
    for (int k = 0; k < parts_; ++k) {
      const int part = (first + k) % parts_;
      const std::int64_t begin = part * per_part_, end = std::min(begin + per_part_, count_);
      for (std::int64_t i;
           (i = begin + taken_[part].fetch_add(1, std::memory_order_relaxed)) < end;) {
        work(i);
      }
    }
  }

 private:
  static constexpr int kMaxParts = 32;
  std::int64_t count_;
  int parts_;
  std::int64_t per_part_;
  std::atomic<std::int64_t> taken_[kMaxParts]{};
};

}  // namespace adamax::cpu
