// CUDA on a CPU, for tests: enough of it to run the kernels of this folder as they are written.
//
// The trick: each thread of a block is a fiber (ucontext) with a stack of its own, which runs until it waits: at
// `__syncthreads` for its block, at a shuffle for its warp. Between two waits, threads run one after another in an order that
// the caller chooses, as do blocks. A result that depends on the order is a race. Besides, shared memory knows who read and
// wrote each element since the last barrier of the block, and reports two threads that nothing orders. It also reports an index
// outside of an array, a barrier or shuffle that some threads of the block or warp do not reach, and arguments of other
// types than the kernel's. Memory that nothing has written holds not-a-number.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

namespace emulator {

constexpr unsigned LANES = 32;
constexpr std::size_t STACK_BYTES = 64 * 1024;

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

enum class State { Runs, AtBarrier, AtShuffle, Done };

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    Index index;
    State state = State::Done;
    int line = 0;       // of the barrier or shuffle at which it waits
    unsigned shuffles = 0;
};

// Who used an element of shared memory since the last barrier.
struct Uses {
    unsigned epoch = 0;
    int writer = -1, reader = -1;
    bool read_by_several = false;
};

struct Memory {
    std::vector<unsigned char> bytes;
    std::vector<Uses> uses;
};

// A launch in progress.
struct Launch {
    ucontext_t scheduler;
    std::vector<std::unique_ptr<Thread>> threads;
    std::map<const void *, Memory> shared; // by the declaration in the kernel
    std::uint64_t exchanged[2][1024];      // values of shuffles and votes; one may still be read while the next is written
    std::function<void()> kernel;
    std::string error;
    unsigned current = 0, size = 0, epoch = 0, dynamic_bytes = 0;
    Index block, grid, block_size;
};

// One launch at a time on each thread of the host.
inline Launch &launch() {
    static thread_local Launch launch;
    return launch;
}

inline Thread &current() { return *launch().threads[launch().current]; }

// Back to the scheduler.
inline void yield() {
    Thread &thread = current();
    swapcontext(&thread.context, &launch().scheduler);
}

// Ends the launch with an error; the calling thread does not go on.
inline void fail(const std::string &error) {
    if (launch().error.empty()) launch().error = error;
    while (true) {
        current().state = State::Done;
        yield();
    }
}

inline void wait(State state, int line) {
    Thread &thread = current();
    thread.state = state;
    thread.line = line;
    yield();
}

template <class T>
T shuffle(T value, unsigned other_lane, unsigned mask, int line) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t), "a shuffle exchanges at most 8 bytes");
    if (mask != 0xffffffffu) fail("line " + std::to_string(line) + ": a shuffle among some lanes is not emulated");
    Launch &now = launch();
    std::uint64_t *slots = now.exchanged[current().shuffles++ % 2] + now.current / LANES * LANES;
    std::memcpy(slots + now.current % LANES, &value, sizeof(T));
    wait(State::AtShuffle, line);
    if (other_lane < LANES) std::memcpy(&value, slots + other_lane, sizeof(T));
    return value;
}

inline unsigned ballot(bool vote, unsigned mask, int line) {
    if (mask != 0xffffffffu) fail("line " + std::to_string(line) + ": a vote of some lanes is not emulated");
    Launch &now = launch();
    std::uint64_t *slots = now.exchanged[current().shuffles++ % 2] + now.current / LANES * LANES;
    slots[now.current % LANES] = vote;
    wait(State::AtShuffle, line);
    unsigned bits = 0;
    for (unsigned i = 0; i < LANES; i++) bits |= static_cast<unsigned>(slots[i]) << i;
    return bits;
}

inline unsigned lane() { return launch().current % LANES; }

// A reference to an element of shared memory that notes each use.
template <class T>
class Element {
  public:
    Element(T *at, Uses *uses, int line) : at(at), uses(uses), line(line) {}

    operator T() const {
        Uses &now = fresh();
        int thread = static_cast<int>(launch().current);
        if (now.writer >= 0 && now.writer != thread) conflict(now.writer, "writes", "reads");
        if (now.reader >= 0 && now.reader != thread) now.read_by_several = true;
        now.reader = thread;
        return *at;
    }

    Element &operator=(T value) {
        Uses &now = fresh();
        int thread = static_cast<int>(launch().current);
        if (now.writer >= 0 && now.writer != thread) conflict(now.writer, "writes", "writes");
        if (now.read_by_several || (now.reader >= 0 && now.reader != thread)) conflict(now.reader, "reads", "writes");
        now.writer = thread;
        *at = value;
        return *this;
    }

    Element &operator=(const Element &other) { return *this = static_cast<T>(other); }
    Element &operator+=(T value) { return *this = static_cast<T>(*this) + value; }

  private:
    Uses &fresh() const {
        if (uses->epoch != launch().epoch) *uses = Uses{launch().epoch};
        return *uses;
    }

    void conflict(int other, const char *theirs, const char *ours) const {
        fail("line " + std::to_string(line) + ": thread " + std::to_string(other) + " " + theirs + " and thread " +
             std::to_string(launch().current) + " " + ours + " the same shared element without a barrier between");
    }

    T *at;
    Uses *uses;
    int line;
};

// An array in shared memory.
template <class T>
class Shared {
  public:
    Shared(const void *declaration, std::size_t count, int line) : memory(launch().shared[declaration]), line(line) {
        if (memory.uses.empty()) {
            memory.bytes.assign(count * sizeof(T), 0xff);
            memory.uses.assign(count, Uses{});
        }
    }

    Element<T> operator[](long long i) {
        if (i < 0 || i >= static_cast<long long>(memory.uses.size()))
            fail("line " + std::to_string(line) + ": index " + std::to_string(i) + " of " +
                 std::to_string(memory.uses.size()) + " shared elements");
        return {reinterpret_cast<T *>(memory.bytes.data()) + i, &memory.uses[i], line};
    }

  private:
    Memory &memory;
    int line;
};

inline void run_thread() {
    launch().kernel();
    current().state = State::Done;
    yield();
}

// Items in the order of a launch: 0 forward, 1 backward, else shuffled by this seed.
class Order {
  public:
    explicit Order(std::uint64_t kind) : kind(kind), state(kind * 0x9e3779b97f4a7c15u + 1) {}

    std::vector<unsigned> of(unsigned count) {
        std::vector<unsigned> items(count);
        std::iota(items.begin(), items.end(), 0u);
        if (kind == 1) std::reverse(items.begin(), items.end());
        if (kind > 1)
            for (unsigned i = count; i > 1; i--) std::swap(items[i - 1], items[next() % i]);
        return items;
    }

  private:
    std::uint64_t next() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return state >> 11;
    }

    std::uint64_t kind, state;
};

// Lets threads go on that have all reached the same barrier or shuffle. Returns whether there are any.
inline bool release(Launch &now) {
    auto all = [&](unsigned first, unsigned count, State state) {
        for (unsigned i = first; i < first + count; i++)
            if (now.threads[i]->state != state || now.threads[i]->line != now.threads[first]->line) return false;
        for (unsigned i = first; i < first + count; i++) now.threads[i]->state = State::Runs;
        return true;
    };
    bool any = false;
    for (unsigned warp = 0; warp < now.size; warp += LANES) any |= all(warp, LANES, State::AtShuffle);
    if (any) return true;
    now.epoch++;
    return all(0, now.size, State::AtBarrier);
}

inline std::string waits(Launch &now) {
    std::string text;
    for (unsigned i = 0; i < now.size; i++) {
        const Thread &thread = *now.threads[i];
        const char *what = thread.state == State::AtBarrier ? "a barrier" : "a shuffle";
        if (thread.state != State::Done)
            return "thread " + std::to_string(i) + " waits for others at " + what + " in line " +
                   std::to_string(thread.line) + ", which not all of them reach";
    }
    return text;
}

inline void run_block(Launch &now, Order &order) {
    now.shared.clear();
    for (unsigned i = 0; i < now.size; i++) {
        Thread &thread = *now.threads[i];
        thread.index = Index{i, 0, 0};
        thread.state = State::Runs;
        thread.shuffles = 0;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = STACK_BYTES;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_thread, 0);
    }
    do {
        for (unsigned i : order.of(now.size)) {
            if (now.threads[i]->state != State::Runs) continue;
            now.current = i;
            swapcontext(&now.scheduler, &now.threads[i]->context);
            if (!now.error.empty()) return;
        }
    } while (release(now));
    now.error = waits(now);
}

// The arguments of a kernel as the driver passes them, by the address of each.
struct Kernel {
    std::vector<std::size_t> sizes;
    std::function<void(void **)> call;
};

template <class... A, std::size_t... I>
std::function<void(void **)> call_of(void (*kernel)(A...), std::index_sequence<I...>) {
    return [kernel](void **arguments) { kernel(*static_cast<A *>(arguments[I])...); };
}

template <class... A>
Kernel kernel_of(void (*kernel)(A...)) {
    return {{sizeof(A)...}, call_of(kernel, std::index_sequence_for<A...>{})};
}

// Runs a kernel; returns what went wrong, or nothing.
inline std::string run(const Kernel &kernel, Index grid, unsigned threads, unsigned dynamic_bytes,
                       const std::vector<std::pair<void *, std::size_t>> &arguments, std::uint64_t kind) {
    if (threads == 0 || threads % LANES != 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.y > 65535)
        return "no GPU accepts blocks of " + std::to_string(threads) + " threads in a grid of " + std::to_string(grid.x) +
               " x " + std::to_string(grid.y);
    if (dynamic_bytes > 48 * 1024) return "more than 48 KB of shared memory";
    std::vector<void *> addresses;
    std::vector<std::size_t> sizes;
    for (auto &[address, size] : arguments) {
        addresses.push_back(address);
        sizes.push_back(size);
    }
    if (sizes != kernel.sizes) return "the arguments are not those of the kernel";
    Launch &now = launch();
    now.error.clear();
    now.size = threads;
    now.dynamic_bytes = dynamic_bytes;
    now.grid = grid;
    now.block_size = Index{threads, 1, 1};
    now.kernel = [&] { kernel.call(addresses.data()); };
    while (now.threads.size() < threads) now.threads.push_back(std::make_unique<Thread>());
    Order order(kind);
    for (unsigned block : order.of(grid.x * grid.y)) {
        now.block = Index{block % grid.x, block / grid.x, 0};
        run_block(now, order);
        if (!now.error.empty())
            return "block " + std::to_string(now.block.x) + ", " + std::to_string(now.block.y) + ": " + now.error;
    }
    return {};
}

} // namespace emulator

#define __global__
#define __device__
#define threadIdx (emulator::current().index)
#define blockIdx (emulator::launch().block)
#define blockDim (emulator::launch().block_size)
#define gridDim (emulator::launch().grid)

#define SHARED(T, name, count) \
    static const char name##_declaration = 0; \
    emulator::Shared<T> name(&name##_declaration, count, __LINE__)
#define DYNAMIC_SHARED(T, name) \
    static const char name##_declaration = 0; \
    emulator::Shared<T> name(&name##_declaration, emulator::launch().dynamic_bytes / sizeof(T), __LINE__)

#define __syncthreads() emulator::wait(emulator::State::AtBarrier, __LINE__)
#define __shfl_xor_sync(mask, value, step) \
    emulator::shuffle(value, emulator::lane() ^ static_cast<unsigned>(step), mask, __LINE__)
#define __shfl_down_sync(mask, value, step) \
    emulator::shuffle(value, emulator::lane() + static_cast<unsigned>(step), mask, __LINE__)
#define __ballot_sync(mask, vote) emulator::ballot(vote, mask, __LINE__)

inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
