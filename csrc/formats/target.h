// Every translation unit that holds kernels names its target (SR_TARGET: an instruction set, cuda, host). All code of this
// folder lives in a namespace of that name, so that the linker can never merge a copy compiled for one with another's.
#pragma once

#include <stdint.h>
#include <string.h>

#ifndef SR_TARGET
#define SR_TARGET host
#endif

#if defined(__CUDACC__)
#define SR_MEMBER __host__ __device__ __forceinline__
#else
#define SR_MEMBER inline __attribute__((always_inline))
#endif
#define SR_FN static SR_MEMBER
