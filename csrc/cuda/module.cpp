// The Python module _cuda: hands the backend to _core, and nothing else.
#include <Python.h>

#include "cuda/backend.hpp"

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
#ifdef Py_GIL_DISABLED
  PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  PyObject* const capsule = PyCapsule_New(const_cast<adamax::Backend*>(&adamax::cuda::backend()),
                                          "adamax_ext.Backend", nullptr);
  if (capsule == nullptr || PyModule_AddObject(module, "backend", capsule) != 0) {
    Py_XDECREF(capsule);
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
