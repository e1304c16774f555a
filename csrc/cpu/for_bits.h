// From a number of bits that is known at run time to one that is known when compiling.
#ifndef GCOMPRESS_CPU_FOR_BITS_H
#define GCOMPRESS_CPU_FOR_BITS_H

// clang-format off
#define GC_FOR_BITS(bits, call)            \
    switch (bits) {                        \
        case 1: { enum { B = 1 }; call; } break; \
        case 2: { enum { B = 2 }; call; } break; \
        case 3: { enum { B = 3 }; call; } break; \
        case 4: { enum { B = 4 }; call; } break; \
        case 5: { enum { B = 5 }; call; } break; \
        case 6: { enum { B = 6 }; call; } break; \
        case 7: { enum { B = 7 }; call; } break; \
        default: { enum { B = 8 }; call; } break; \
    }
// clang-format on

#endif
