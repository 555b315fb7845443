// The Python module _cuda: hands the backend to _core and the handler to JAX, and nothing else.
#include <Python.h>

#include "cuda/backend.hpp"
#include "xla/handler.hpp"

namespace {

bool add_capsule(PyObject* module, const char* name, void* pointer, const char* type) {
  PyObject* const capsule = PyCapsule_New(pointer, type, nullptr);
  if (capsule != nullptr && PyModule_AddObject(module, name, capsule) == 0) return true;
  Py_XDECREF(capsule);
  return false;
}

}  // namespace

PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_cuda",
                                   "CUDA kernels of adamax_ext.",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  if (add_capsule(module, "backend", const_cast<adamax::Backend*>(&adamax::cuda::backend()),
                  "adamax_ext.Backend") &&
      add_capsule(module, "xla_step", reinterpret_cast<void*>(&adamax::xla::step_on_cuda),
                  "xla._CUSTOM_CALL_TARGET")) {
    return module;
  }
  Py_DECREF(module);
  return nullptr;
}
