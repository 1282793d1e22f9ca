// A CUDA driver whose device is the CPU, so that a program with CUDA runs without a GPU: slowly, one launch after another.
//
// Kernels arrive as PTX, as a real driver gets them; ptx_to_c.py translates each to C when it is first called. The device finds
// what a GPU does not forgive: a kernel that its module lacks, an access outside of an allocation or after it was freed, memory
// read before it is written (it holds not-a-number), a barrier that not all threads reach, and two streams that use the same
// memory without an event that orders them. A launch that does any of it fails, with a line on stderr.
//
// EMULATED_GPU_LOG names a file to which each process appends, as it ends, a line of JSON: how often it did what.
// EMULATED_GPUS is the number of devices (2).
#include "driver.h"
#include "thread.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <functional>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace emulated {

enum Result {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NOT_FOUND = 500,
    INVALID_PTX = 218, ILLEGAL_ADDRESS = 700,
};

std::recursive_mutex mutex;

// ---- What was done.

namespace {

struct Log {
    std::map<std::string, std::uint64_t> counts;

    ~Log() {
        const char *path = std::getenv("EMULATED_GPU_LOG");
        if (!path || counts.empty()) return;
        std::string text = "{";
        for (auto &[name, count] : counts)
            text += (text.size() > 1 ? ",\"" : "\"") + name + "\":" + std::to_string(count);
        text += "}\n";
        int file = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
        if (file >= 0 && write(file, text.data(), text.size()) < 0) std::perror(path);
        if (file >= 0) close(file);
    }
} log_;

} // namespace

void count(const std::string &what, std::uint64_t times) { log_.counts[what] += times; }

bool complain(const std::string &what) {
    std::fprintf(stderr, "emulated GPU: %s\n", what.c_str());
    count("errors");
    return false;
}

// ---- Memory: one large range of addresses; a table says which allocation each page belongs to.

namespace {

constexpr std::uint64_t ARENA = 1ull << 36, PAGE = 4096;

// When a stream, by its number, last used an allocation, and for what.
struct Use {
    int stream = -1;
    std::uint64_t time = 0;
    std::string what;
};

struct Allocation : region {
    int device = 0;
    Use written;
    std::vector<Use> read; // since it was written
};

struct Memory {
    char *base = static_cast<char *>(reserve(ARENA));
    std::uint32_t *owners = static_cast<std::uint32_t *>(reserve(ARENA / PAGE * sizeof(std::uint32_t)));
    std::vector<std::unique_ptr<Allocation>> allocations{1}; // none is number 0
    std::vector<std::uint32_t> unused;
    std::map<std::uint64_t, std::vector<std::uint64_t>> freed; // addresses by pages
    std::uint64_t end = PAGE, used = 0, peak = 0;

    static void *reserve(std::uint64_t bytes) {
        void *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) std::abort();
        return at;
    }

    std::uint64_t page(std::uint64_t address) const { return (address - reinterpret_cast<std::uint64_t>(base)) / PAGE; }

    Allocation *find(std::uint64_t address) const {
        std::uint64_t at = page(address);
        return at < ARENA / PAGE ? allocations[owners[at]].get() : nullptr;
    }
} memory;

std::uint64_t launches = 1;           // the number of the launch in progress
std::vector<Allocation *> touched;    // by it

// The allocation that holds [address, address + bytes), noted as used by the launch in progress; null if none does.
inline Allocation *use(std::uint64_t address, std::uint64_t bytes, bool write) {
    Allocation *found = memory.find(address);
    if (!found || address - found->begin + bytes > found->bytes) return nullptr;
    if (found->read_by != launches && found->written_by != launches) touched.push_back(found);
    (write ? found->written_by : found->read_by) = launches;
    return found;
}

} // namespace

// ---- Streams: one runs after another here. Vector clocks tell whether events would order them on a GPU.

namespace {

typedef std::vector<std::uint64_t> Clock; // by stream

struct Stream {
    int number;
    Clock clock;
};

Clock host; // what the host has waited for
std::vector<std::unique_ptr<Stream>> streams;

void merge(Clock &into, const Clock &other) {
    if (into.size() < other.size()) into.resize(other.size());
    for (std::size_t i = 0; i < other.size(); i++) into[i] = std::max(into[i], other[i]);
}

Stream &stream_of(void *handle) {
    if (streams.empty()) streams.push_back(std::make_unique<Stream>(Stream{0, {0}}));
    // 0, 1 and 2 are the default streams.
    return reinterpret_cast<std::uintptr_t>(handle) < 3 ? *streams[0] : *static_cast<Stream *>(handle);
}

bool before(const Use &use, const Clock &clock) {
    return use.stream < 0 || (std::size_t(use.stream) < clock.size() && clock[use.stream] >= use.time);
}

} // namespace

Step::Step(void *handle) : stream(handle) {
    launches++;
    touched.clear();
    Stream &now = stream_of(handle);
    merge(now.clock, host);
    if (now.clock.size() <= std::size_t(now.number)) now.clock.resize(now.number + 1);
    now.clock[now.number]++;
}

bool Step::reads(const void *address, std::uint64_t bytes) { return uses(address, bytes, false); }

bool Step::writes(void *address, std::uint64_t bytes) { return uses(address, bytes, true); }

bool Step::uses(const void *address, std::uint64_t bytes, bool write) {
    if (bytes == 0 || use(reinterpret_cast<std::uint64_t>(address), bytes, write)) return true;
    return complain("no allocation holds " + std::to_string(bytes) + " bytes at an address");
}

bool Step::ordered(const std::string &what) {
    Stream &now = stream_of(stream);
    bool good = true;
    for (Allocation *allocation : touched) {
        bool write = allocation->written_by == launches;
        auto conflict = [&](const Use &other, const char *theirs) {
            good = complain(what + " on stream " + std::to_string(now.number) + (write ? " writes" : " reads") +
                            " memory that " + other.what + " on stream " + std::to_string(other.stream) + " " + theirs +
                            ", and no event orders the two");
        };
        if (!before(allocation->written, now.clock)) conflict(allocation->written, "writes");
        Use ours{now.number, now.clock[now.number], what};
        if (write) {
            for (const Use &read : allocation->read)
                if (!before(read, now.clock)) conflict(read, "reads");
            allocation->written = ours;
            allocation->read.clear();
        } else {
            auto same = [&](const Use &read) { return read.stream == now.number; };
            auto found = std::find_if(allocation->read.begin(), allocation->read.end(), same);
            if (found == allocation->read.end()) allocation->read.push_back(ours);
            else *found = ours;
        }
    }
    return good;
}

// ---- Kernels: each thread of a block is a fiber, which runs until it waits for others.

namespace {

constexpr unsigned LANES = 32, STACK = 32 * 1024;

// Saves the registers that a call keeps, and the stack, and goes on where `to` was saved.
extern "C" void emulated_switch(void **save, void *to);
__asm__(".text\n"
        "emulated_switch:\n"
        "  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
        "  mov %rsp, (%rdi); mov %rsi, %rsp\n"
        "  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret\n");

enum class Waits { No, ForWarp, ForBlock, Done };

struct Fiber {
    gpu_thread thread;
    void *top;
    Waits waits;
    std::uint32_t value; // given to a shuffle or a vote
    std::unique_ptr<char[]> stack{new char[STACK]};
};

struct Run {
    const gpu_kernel *kernel;
    std::vector<std::unique_ptr<Fiber>> fibers;
    unsigned size, current;
    void *scheduler;
    jmp_buf failed;
    std::string error;
} run;

[[noreturn]] void fail(const char *why) {
    run.error = why;
    _longjmp(run.failed, 1);
}

const region *access(std::uint64_t address, std::uint32_t bytes, int write) {
    const region *found = use(address, bytes, write);
    if (!found) fail(write ? "writes outside of all allocations" : "reads outside of all allocations");
    if (address % bytes) fail("an address that is not aligned");
    return found;
}

Fiber &wait(Waits what) {
    Fiber &fiber = *run.fibers[run.current];
    fiber.waits = what;
    emulated_switch(&fiber.top, run.scheduler);
    return fiber;
}

void barrier(gpu_thread *) { wait(Waits::ForBlock); }

std::uint32_t shuffle(gpu_thread *, std::uint32_t value, std::uint32_t lane, std::uint32_t clamp, char mode) {
    if (clamp != (mode == 'u' ? 0 : LANES - 1)) fail("a shuffle among parts of a warp is not emulated");
    unsigned ours = run.current % LANES, first = run.current - ours;
    run.fibers[run.current]->value = value;
    wait(Waits::ForWarp);
    unsigned other = mode == 'b' ? ours ^ lane : mode == 'd' ? ours + lane : mode == 'u' ? ours - lane : lane;
    std::uint32_t found = other < LANES && first + other < run.size ? run.fibers[first + other]->value : value;
    // None may give its next value before all have read this one.
    wait(Waits::ForWarp);
    return found;
}

std::uint32_t ballot(gpu_thread *, int vote) {
    unsigned first = run.current / LANES * LANES;
    run.fibers[run.current]->value = vote != 0;
    wait(Waits::ForWarp);
    std::uint32_t bits = 0;
    for (unsigned i = first; i < std::min(first + LANES, run.size); i++) bits |= run.fibers[i]->value << (i - first);
    wait(Waits::ForWarp);
    return bits;
}

gpu_services services{access, reinterpret_cast<std::uint64_t>(memory.base), reinterpret_cast<std::uint64_t>(memory.base) + ARENA,
                      0, fail, barrier, shuffle, ballot};

void fiber_begins() {
    Fiber &fiber = *run.fibers[run.current];
    run.kernel->run(&fiber.thread);
    wait(Waits::Done);
    std::abort();
}

void prepare(Fiber &fiber) {
    auto **top = reinterpret_cast<void **>((reinterpret_cast<std::uintptr_t>(fiber.stack.get()) + STACK) & ~std::uintptr_t(15));
    *--top = nullptr; // no caller
    *--top = reinterpret_cast<void *>(fiber_begins);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.top = top;
    fiber.waits = Waits::No;
}

// Runs the threads of a block that has barriers or shuffles, warp by warp.
void run_waiting() {
    for (unsigned i = 0; i < run.size; i++) prepare(*run.fibers[i]);
    for (unsigned done = 0; done < run.size;) {
        for (unsigned warp = 0; warp < run.size; warp += LANES) {
            unsigned end = std::min(warp + LANES, run.size);
            for (bool runs = true; runs;) {
                unsigned in_warp = 0, ended = 0;
                for (run.current = warp; run.current < end; run.current++) {
                    Fiber &fiber = *run.fibers[run.current];
                    if (fiber.waits == Waits::No) emulated_switch(&run.scheduler, fiber.top);
                    in_warp += fiber.waits == Waits::ForWarp;
                    ended += fiber.waits == Waits::Done;
                }
                runs = in_warp > 0;
                if (runs && in_warp != end - warp) fail("a shuffle that some threads of a warp do not reach");
                for (unsigned i = warp; runs && i < end; i++) run.fibers[i]->waits = Waits::No;
            }
        }
        done = 0;
        for (unsigned i = 0; i < run.size; i++) done += run.fibers[i]->waits == Waits::Done;
        // Since Volta, threads that have ended do not take part in a barrier; but no kernel here relies on it.
        if (done > 0 && done < run.size) fail("a barrier that some threads of a block do not reach");
        for (unsigned i = 0; i < run.size && done == 0; i++) run.fibers[i]->waits = Waits::No;
    }
}

typedef unsigned Size[3];

std::string run_kernel(const gpu_kernel *kernel, const Size &grid, const Size &block, unsigned dynamic_bytes, void **args) {
    unsigned threads = block[0] * block[1] * block[2];
    std::uint64_t most = std::max({grid[1], grid[2]});
    if (threads == 0 || threads > 1024 || grid[0] == 0 || grid[0] > 0x7fffffff || most == 0 || most > 65535)
        return "no GPU accepts this grid: " + std::to_string(grid[0]) + " x " + std::to_string(grid[1]) + " x " +
               std::to_string(grid[2]) + " blocks of " + std::to_string(threads) + " threads";
    unsigned shared_bytes = kernel->shared_bytes + dynamic_bytes;
    if (shared_bytes > 48 * 1024) return "more than 48 KB of shared memory";
    std::vector<unsigned char> params(kernel->param_bytes + 1);
    for (unsigned i = 0; i < kernel->param_count; i++)
        std::memcpy(params.data() + kernel->params[i][0], args[i], kernel->params[i][1]);
    std::vector<std::uint64_t> shared(shared_bytes / 8 + 1);
    run.kernel = kernel;
    run.size = threads;
    run.error.clear();
    while (run.fibers.size() < threads) run.fibers.push_back(std::make_unique<Fiber>());
    for (unsigned i = 0; i < threads; i++) {
        gpu_thread &thread = run.fibers[i]->thread;
        thread.params = params.data();
        thread.shared = reinterpret_cast<unsigned char *>(shared.data());
        thread.shared_bytes = shared_bytes;
        thread.tid[0] = i % block[0];
        thread.tid[1] = i / block[0] % block[1];
        thread.tid[2] = i / block[0] / block[1];
        std::copy(block, block + 3, thread.ntid);
        std::copy(grid, grid + 3, thread.nctaid);
    }
    kernel->services->launch = launches;
    if (_setjmp(run.failed)) return run.error;
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                std::fill(shared.begin(), shared.end(), ~0ull);
                for (unsigned i = 0; i < threads; i++) {
                    unsigned place[3] = {x, y, z};
                    std::copy(place, place + 3, run.fibers[i]->thread.ctaid);
                }
                if (kernel->waits) run_waiting();
                else
                    for (unsigned i = 0; i < threads; i++) kernel->run(&run.fibers[i]->thread);
            }
    return {};
}

// ---- Modules.

struct Function {
    std::string name;
    gpu_kernel *kernel = nullptr;
};

struct Module {
    std::string path; // of its PTX
    std::uint64_t hash;
    std::map<std::string, std::unique_ptr<Function>> functions;
};

std::string folder() {
    Dl_info info;
    dladdr(reinterpret_cast<void *>(folder), &info);
    std::string path = info.dli_fname;
    return path.substr(0, path.rfind('/')) + "/kernels";
}

// Compiles a kernel unless an earlier process has. Its file appears whole.
gpu_kernel *compiled(const Module &module, const std::string &name) {
    std::string stem = folder() + "/" + name + "-" + std::to_string(module.hash), library = stem + ".so";
    if (::access(library.c_str(), R_OK) != 0) {
        std::string mine = stem + "." + std::to_string(getpid());
        std::string command = "python3 " EMULATED_GPU_SOURCES "/ptx_to_c.py " + module.path + " " + name + " > " + mine +
                              ".c && cc -O1 -w -shared -fPIC -ffp-contract=off -I" EMULATED_GPU_SOURCES " " + mine +
                              ".c -o " + mine + ".so -lm && mv " + mine + ".so " + library + " && rm " + mine + ".c";
        if (std::system(command.c_str()) != 0) {
            complain("cannot translate the kernel " + name);
            return nullptr;
        }
    }
    void *opened = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    auto *kernel = opened ? static_cast<gpu_kernel *>(dlsym(opened, "kernel")) : nullptr;
    if (!kernel) complain(dlerror());
    else *kernel->services = services;
    return kernel;
}

thread_local void *context;

struct Event {
    Clock clock;
};

Result moved(void *to, const void *from, std::uint64_t bytes, Step &step, const char *what) {
    if (!context) return INVALID_CONTEXT;
    if (!step.ordered(what)) return ILLEGAL_ADDRESS;
    std::memcpy(to, from, bytes);
    return SUCCESS;
}

} // namespace

} // namespace emulated

using namespace emulated;

#define LOCKED std::lock_guard<std::recursive_mutex> guard(emulated::mutex)

extern "C" {

// ---- Devices and contexts.

int cuInit(unsigned) { return SUCCESS; }

int cuDeviceGetCount(int *count) {
    const char *wanted = std::getenv("EMULATED_GPUS");
    *count = wanted ? std::atoi(wanted) : 2;
    return SUCCESS;
}

int cuDeviceGet(int *device, int number) {
    int count;
    cuDeviceGetCount(&count);
    if (number < 0 || number >= count) return INVALID_DEVICE;
    *device = number;
    return SUCCESS;
}

int cuDeviceGetName(char *name, int bytes, int) {
    std::snprintf(name, bytes, "emulated GPU");
    return SUCCESS;
}

int cuDeviceGetUuid(unsigned char *uuid, int device) {
    std::memset(uuid, 0, 16);
    uuid[0] = static_cast<unsigned char>(device + 1);
    return SUCCESS;
}

int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { return cuDeviceGetUuid(uuid, device); }

int cuDeviceTotalMem_v2(std::uint64_t *bytes, int) {
    *bytes = 16ull << 30;
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int) {
    static const std::map<int, int> attributes{
        {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 0x7fffffff}, {6, 65535}, {7, 65535}, {8, 48 * 1024}, {10, 32},
        {16, 1}, {75, 8}, {76, 0}, {115, 1}, // memory pools
    };
    auto found = attributes.find(attribute);
    *value = found == attributes.end() ? 0 : found->second;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **found, int device) {
    *found = reinterpret_cast<void *>(static_cast<std::uintptr_t>(device) + 1);
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }

int cuCtxSetCurrent(void *now) {
    context = now;
    return SUCCESS;
}

int cuCtxGetCurrent(void **now) {
    *now = context;
    return SUCCESS;
}

int cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return SUCCESS;
}

int cuCtxSynchronize() {
    LOCKED;
    count("synchronize context");
    for (auto &stream : streams) merge(host, stream->clock);
    return SUCCESS;
}

int cuGetErrorName(int code, const char **text) {
    *text = code == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND" : code == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR";
    return SUCCESS;
}

int cuGetErrorString(int code, const char **text) {
    *text = code == NOT_FOUND ? "named symbol not found" : "the emulated GPU refuses (see stderr)";
    return SUCCESS;
}

// ---- Memory.

int cuMemAllocAsync(std::uint64_t *address, std::uint64_t bytes, void *stream) {
    LOCKED;
    if (!context) return INVALID_CONTEXT;
    if (bytes == 0) {
        complain("an allocation of no bytes");
        return INVALID_VALUE;
    }
    std::uint64_t pages = (bytes + PAGE - 1) / PAGE;
    auto &freed = memory.freed[pages];
    std::uint64_t at;
    if (freed.empty()) {
        at = reinterpret_cast<std::uint64_t>(memory.base) + memory.end;
        // A page between two allocations belongs to neither.
        memory.end += (pages + 1) * PAGE;
        if (memory.end > ARENA) return OUT_OF_MEMORY;
    } else {
        at = freed.back();
        freed.pop_back();
    }
    std::uint32_t number;
    if (memory.unused.empty()) {
        number = memory.allocations.size();
        memory.allocations.emplace_back();
    } else {
        number = memory.unused.back();
        memory.unused.pop_back();
    }
    auto allocation = std::make_unique<Allocation>();
    allocation->begin = at;
    allocation->bytes = bytes;
    Step step(stream);
    Stream &now = stream_of(stream);
    allocation->written = Use{now.number, now.clock[now.number], "its allocation"};
    memory.allocations[number] = std::move(allocation);
    std::fill_n(memory.owners + memory.page(at), pages, number);
    // Not a number, in every type.
    std::memset(reinterpret_cast<void *>(at), 0xff, bytes);
    memory.used += bytes;
    memory.peak = std::max(memory.peak, memory.used);
    count("allocate");
    *address = at;
    return SUCCESS;
}

int cuMemFreeAsync(std::uint64_t address, void *stream) {
    LOCKED;
    Step step(stream);
    Allocation *allocation = memory.find(address);
    if (!allocation || allocation->begin != address) return INVALID_VALUE;
    step.writes(reinterpret_cast<void *>(address), 1);
    if (!step.ordered("freeing")) return ILLEGAL_ADDRESS;
    std::uint64_t pages = (allocation->bytes + PAGE - 1) / PAGE, first = memory.page(address);
    std::uint32_t number = memory.owners[first];
    memory.used -= allocation->bytes;
    std::fill_n(memory.owners + first, pages, 0u);
    memory.allocations[number].reset();
    memory.unused.push_back(number);
    madvise(reinterpret_cast<void *>(address), pages * PAGE, MADV_DONTNEED);
    memory.freed[pages].push_back(address);
    return SUCCESS;
}

int cuMemAlloc_v2(std::uint64_t *address, std::uint64_t bytes) {
    cuCtxSynchronize();
    return cuMemAllocAsync(address, bytes, nullptr);
}

int cuMemFree_v2(std::uint64_t address) {
    cuCtxSynchronize();
    return cuMemFreeAsync(address, nullptr);
}

int cuMemHostAlloc(void **address, std::uint64_t bytes, unsigned) {
    *address = std::malloc(bytes);
    return *address ? SUCCESS : OUT_OF_MEMORY;
}

int cuMemFreeHost(void *address) {
    std::free(address);
    return SUCCESS;
}

int cuMemGetInfo_v2(std::uint64_t *free, std::uint64_t *total) {
    cuDeviceTotalMem_v2(total, 0);
    *free = *total - std::min(*total, memory.used);
    return SUCCESS;
}

int cuDeviceGetDefaultMemPool(void **pool, int device) {
    *pool = reinterpret_cast<void *>(static_cast<std::uintptr_t>(device) + 1);
    return SUCCESS;
}

int cuMemPoolSetAttribute(void *, int attribute, const std::uint64_t *value) {
    LOCKED;
    if (attribute == 8 && *value == 0) memory.peak = memory.used;
    return SUCCESS;
}

int cuMemPoolGetAttribute(void *, int attribute, std::uint64_t *value) {
    LOCKED;
    *value = attribute == 7 ? memory.used : memory.peak;
    return SUCCESS;
}

int cuMemsetD8Async(std::uint64_t address, unsigned char value, std::uint64_t bytes, void *stream) {
    LOCKED;
    if (!context) return INVALID_CONTEXT;
    Step step(stream);
    void *to = reinterpret_cast<void *>(address);
    if (!step.writes(to, bytes) || !step.ordered("filling")) return ILLEGAL_ADDRESS;
    std::memset(to, value, bytes);
    count("fill");
    return SUCCESS;
}

int cuMemsetD8_v2(std::uint64_t address, unsigned char value, std::uint64_t bytes) {
    return cuMemsetD8Async(address, value, bytes, nullptr);
}

int cuMemcpyHtoDAsync_v2(std::uint64_t address, const void *from, std::uint64_t bytes, void *stream) {
    LOCKED;
    Step step(stream);
    void *to = reinterpret_cast<void *>(address);
    if (!step.writes(to, bytes)) return ILLEGAL_ADDRESS;
    count("copy from the host");
    count("bytes from the host", bytes);
    return moved(to, from, bytes, step, "a copy from the host");
}

int cuMemcpyDtoHAsync_v2(void *to, std::uint64_t address, std::uint64_t bytes, void *stream) {
    LOCKED;
    Step step(stream);
    const void *from = reinterpret_cast<const void *>(address);
    if (!step.reads(from, bytes)) return ILLEGAL_ADDRESS;
    count("copy to the host");
    count("bytes to the host", bytes);
    return moved(to, from, bytes, step, "a copy to the host");
}

int cuMemcpyDtoDAsync_v2(std::uint64_t to, std::uint64_t from, std::uint64_t bytes, void *stream) {
    LOCKED;
    Step step(stream);
    void *target = reinterpret_cast<void *>(to);
    const void *source = reinterpret_cast<const void *>(from);
    if (!step.reads(source, bytes) || !step.writes(target, bytes)) return ILLEGAL_ADDRESS;
    count("copy on the device");
    count("bytes on the device", bytes);
    return moved(target, source, bytes, step, "a copy on the device");
}

int cuMemcpyPeerAsync(std::uint64_t to, void *, std::uint64_t from, void *, std::uint64_t bytes, void *stream) {
    return cuMemcpyDtoDAsync_v2(to, from, bytes, stream);
}

// ---- Streams and events.

int cuStreamCreate(void **stream, unsigned) {
    LOCKED;
    stream_of(nullptr);
    int number = static_cast<int>(streams.size());
    streams.push_back(std::make_unique<Stream>(Stream{number, Clock(number + 1)}));
    *stream = streams.back().get();
    return SUCCESS;
}

int cuStreamCreateWithPriority(void **stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }

int cuStreamDestroy_v2(void *) { return SUCCESS; }

int cuStreamSynchronize(void *stream) {
    LOCKED;
    count("synchronize a stream");
    merge(host, stream_of(stream).clock);
    return SUCCESS;
}

int cuStreamWaitEvent(void *stream, void *event, unsigned) {
    LOCKED;
    merge(stream_of(stream).clock, static_cast<Event *>(event)->clock);
    return SUCCESS;
}

int cuStreamIsCapturing(void *, int *status) {
    *status = 0;
    return SUCCESS;
}

int cuLaunchHostFunc(void *, void (*call)(void *), void *data) {
    call(data);
    return SUCCESS;
}

int cuEventCreate(void **event, unsigned) {
    *event = new Event;
    return SUCCESS;
}

int cuEventDestroy_v2(void *event) {
    delete static_cast<Event *>(event);
    return SUCCESS;
}

int cuEventRecord(void *event, void *stream) {
    LOCKED;
    Step step(stream);
    static_cast<Event *>(event)->clock = stream_of(stream).clock;
    return SUCCESS;
}

int cuEventSynchronize(void *event) {
    LOCKED;
    count("synchronize an event");
    merge(host, static_cast<Event *>(event)->clock);
    return SUCCESS;
}

int cuEventQuery(void *) { return SUCCESS; }

int cuEventElapsedTime(float *milliseconds, void *, void *) {
    *milliseconds = 0;
    return SUCCESS;
}

int cuEventElapsedTime_v2(float *milliseconds, void *, void *) {
    *milliseconds = 0;
    return SUCCESS;
}

// ---- Modules and launches.

int cuModuleLoadData(void **module, const void *image) {
    LOCKED;
    std::string text = static_cast<const char *>(image);
    if (text.find(".version") == std::string::npos) return INVALID_PTX;
    std::uint64_t hash = 14695981039346656037ull;
    for (unsigned char byte : text) hash = (hash ^ byte) * 1099511628211ull;
    mkdir(folder().c_str(), 0755);
    std::string path = folder() + "/" + std::to_string(hash) + ".ptx", mine = path + "." + std::to_string(getpid());
    FILE *file = std::fopen(mine.c_str(), "w");
    if (!file || std::fputs(text.c_str(), file) < 0 || std::fclose(file) != 0 || std::rename(mine.c_str(), path.c_str()) != 0)
        return INVALID_PTX;
    *module = new Module{path, hash, {}};
    return SUCCESS;
}

int cuModuleUnload(void *) { return SUCCESS; }

int cuModuleGetFunction(void **function, void *of, const char *name) {
    LOCKED;
    auto &module = *static_cast<Module *>(of);
    auto &found = module.functions[name];
    if (!found) {
        gpu_kernel *kernel = compiled(module, name);
        if (!kernel) return NOT_FOUND;
        found = std::make_unique<Function>(Function{name, kernel});
    }
    *function = found.get();
    return SUCCESS;
}

int cuFuncSetAttribute(void *, int, int) { return SUCCESS; }

int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, void *stream, void **args, void **) {
    LOCKED;
    if (!context) return INVALID_CONTEXT;
    const auto &called = *static_cast<Function *>(function);
    Step step(stream);
    Size grid{grid_x, grid_y, grid_z}, block{block_x, block_y, block_z};
    count("launch " + called.name);
    std::string error = run_kernel(called.kernel, grid, block, shared_bytes, args);
    if (!error.empty()) {
        complain(called.name + ": " + error);
        return ILLEGAL_ADDRESS;
    }
    return step.ordered(called.name) ? SUCCESS : ILLEGAL_ADDRESS;
}

} // extern "C"
