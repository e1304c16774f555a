// A machine of one memory node. BytePS places memory on nodes only when several local ranks span PCIe switches.
#ifndef GCOMPRESS_STAND_IN_NUMA_H
#define GCOMPRESS_STAND_IN_NUMA_H

struct bitmask;
static struct bitmask* const numa_all_nodes_ptr = 0;
static struct bitmask* const numa_no_nodes_ptr = 0;

static inline int numa_max_node() { return 0; }
static inline void numa_set_preferred(int) {}
static inline void numa_set_interleave_mask(struct bitmask*) {}
static inline void numa_bind(struct bitmask*) {}
static inline struct bitmask* numa_parse_nodestring(const char*) { return 0; }

#endif
