// Functions that run on the host and, when nvcc compiles them, on a GPU.
//
// Always inlined: a copy under one unit's instruction-set flags must not be merged with another's.
#pragma once

#ifdef __CUDACC__
#define ADAMAX_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ADAMAX_HOST_DEVICE __attribute__((always_inline)) inline
#endif
