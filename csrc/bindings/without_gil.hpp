// Gives up the GIL while a kernel runs, so that other threads of Python go on.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>

namespace adamax::bindings {

// Note [Exit]: when the interpreter ends, CPython before 3.14 ends each other thread that asks for
// the GIL, and unwinds its stack: destructors would drop references without the GIL, and
// pybind11's guard, whose destructor must not throw, would abort the process. So such a thread
// stays where it is until the process has ended, as 3.14 has it.
class WithoutGil {
 public:
  WithoutGil() : thread_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(thread_);
    } catch (...) {
      while (true) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }

 private:
  PyThreadState* thread_;
};

}  // namespace adamax::bindings
