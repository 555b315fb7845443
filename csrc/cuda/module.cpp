// The Python module _cuda: hands the Api to _core, and nothing else.
#include <Python.h>

#include "cuda/device.hpp"

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
  PyObject* const capsule = PyCapsule_New(const_cast<adamax::cuda::Api*>(&adamax::cuda::api()),
                                          "adamax_ext.cuda.Api", nullptr);
  if (capsule == nullptr || PyModule_AddObject(module, "api", capsule) != 0) {
    Py_XDECREF(capsule);
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
