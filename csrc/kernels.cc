// The table of kernels, compiled once per instruction set (GC_ISA); see cpu/simd.h for what that
// forbids. The arithmetic that decides bytes is single-precision add, multiply and divide in a
// fixed order, or integer: -ffp-contract=off keeps it so.
#include "gcompress.h"

#define GC_HEADERS
#include "kernels.def"
#undef GC_HEADERS

#define GC_JOIN_(a, b) a##b
#define GC_JOIN(a, b) GC_JOIN_(a, b)

extern "C" {
extern const gc_kernels GC_JOIN(gc_kernels_, GC_ISA);
const gc_kernels GC_JOIN(gc_kernels_, GC_ISA) = {
#define GC_KERNEL(result, name, parameters) name,
#include "kernels.def"
#undef GC_KERNEL
};
}
