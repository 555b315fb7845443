// The Python module _cuda of the fuzzers: device 0, whose memory is the host's, as are its kernels.
#include <Python.h>

#include <stdexcept>

#include "cpu/run.hpp"

PyMODINIT_FUNC PyInit__cuda() {
  static adamax::Backend backend = adamax::cpu::backend();
  backend.require_usable = [](int device) {
    if (device != 0) throw std::runtime_error("there is device 0 alone");
  };
  backend.device_of = [](const void*) { return 0; };
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* const module = PyModule_Create(&definition);
  PyModule_AddObject(module, "backend", PyCapsule_New(&backend, "adamax_ext.Backend", nullptr));
  return module;
}
