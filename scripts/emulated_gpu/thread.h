/* What a translated kernel and the emulated driver share: a thread of a block, and the arithmetic of PTX that C lacks. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

struct region { /* an allocation of device memory */
    uint64_t begin, bytes;
    uint64_t read_by, written_by; /* the newest launch that did */
};

struct gpu_thread {
    const unsigned char *params;
    unsigned char *shared; /* of its block */
    uint32_t shared_bytes;
    uint32_t tid[3], ntid[3], ctaid[3], nctaid[3];
};

/* What the driver does for a kernel. Addresses of global memory are those of the host. */
struct gpu_services {
    /* Ends the launch with an error unless [address, address + bytes) is in one allocation, which it returns. */
    const struct region *(*access)(uint64_t address, uint32_t bytes, int write);
    uint64_t arena, arena_end; /* where allocations are */
    uint64_t launch;           /* the number of this launch */
    void (*fail)(const char *why);
    void (*barrier)(struct gpu_thread *thread);
    /* The value of another lane: mode i of idx, b of bfly, d of down, u of up. */
    uint32_t (*shuffle)(struct gpu_thread *thread, uint32_t value, uint32_t lane, uint32_t clamp, char mode);
    uint32_t (*ballot)(struct gpu_thread *thread, int vote);
};

/* A translated kernel, the symbol `kernel` of its library. */
struct gpu_kernel {
    const char *name;
    void (*run)(struct gpu_thread *thread);
    const uint32_t (*params)[2]; /* offset and bytes of each */
    uint32_t param_count, param_bytes, shared_bytes;
    int waits; /* whether it has barriers or shuffles */
    struct gpu_services *services;
};

#ifdef __cplusplus
}
#endif

#ifndef __cplusplus

static struct gpu_services services;

/* A pointer to global memory. An instruction mostly stays in one allocation, which it remembers during a launch. */
#define global(address, size, write) \
    ({ \
        static uint64_t begin_, last_, launch_; \
        uint64_t address_ = (address); \
        if (launch_ != services.launch || address_ < begin_ || address_ > last_ || address_ % (size)) { \
            const struct region *region_ = services.access(address_, size, write); \
            begin_ = region_->begin; \
            last_ = region_->begin + region_->bytes - (size); \
            launch_ = services.launch; \
        } \
        (void *)address_; \
    })

/* Of any kind of memory: a pointer to shared or local memory is the host's, too. */
#define generic(address, size, write) \
    ({ \
        uint64_t any_ = (address); \
        any_ >= services.arena && any_ < services.arena_end ? global(any_, size, write) : (void *)any_; \
    })

static inline void *shared(struct gpu_thread *t, uint64_t offset, uint32_t bytes) {
    if (offset + bytes > t->shared_bytes) services.fail("an address outside of shared memory");
    return t->shared + offset;
}

#define BITS(to, from) \
    ({ to bits_; __typeof__(from) from_ = (from); memcpy(&bits_, &from_, sizeof bits_); bits_; })

static inline float as_f32(uint32_t x) { return BITS(float, x); }
static inline uint32_t bits_f32(float x) { return BITS(uint32_t, x); }
static inline double as_f64(uint64_t x) { return BITS(double, x); }
static inline uint64_t bits_f64(double x) { return BITS(uint64_t, x); }
static inline double as_f16(uint16_t x) { return BITS(_Float16, x); }
static inline uint16_t bits_f16(double x) { _Float16 y = (_Float16)x; return BITS(uint16_t, y); }
static inline double as_bf16(uint16_t x) { return as_f32((uint32_t)x << 16); }
static inline uint16_t bits_bf16(double x) { /* to nearest, ties to even */
    uint32_t bits = bits_f32((float)x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline float down(double x) { float y = (float)x; return y > x ? nextafterf(y, -INFINITY) : y; }
static inline float up(double x) { float y = (float)x; return y < x ? nextafterf(y, INFINITY) : y; }
static inline float to_zero(double x) { return x < 0 ? up(x) : down(x); }

/* A float as an integer in [low, high]; what is not a number becomes 0. */
static inline int64_t clamp_signed(double x, double low, double high, int64_t lowest, int64_t highest) {
    return x != x ? 0 : x <= low ? lowest : x >= high ? highest : (int64_t)x;
}
static inline uint64_t clamp_unsigned(double x, double high, uint64_t highest) {
    return !(x > 0) ? 0 : x >= high ? highest : (uint64_t)x;
}
static inline double saturate(double x) { return !(x > 0) ? 0 : x > 1 ? 1 : x; }

/* The kernel's threads run one after another between barriers: an atomic operation is a plain one. */
#define ATOMIC(type, pointer, value) \
    ({ type *at_ = (pointer); type old_ = *at_; *at_ = (value); old_; })

#endif
