// cuBLAS, cuRAND and NCCL on the emulated driver, as far as candle and this program call them.
#include "driver.h"
#include "thread.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <fcntl.h>
#include <functional>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>

using namespace emulated;

#define LOCKED std::lock_guard<std::recursive_mutex> guard(emulated::mutex)

namespace {

float from_bf16(std::uint16_t x) {
    std::uint32_t bits = std::uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

std::uint16_t to_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// By their definition (IEEE 754): gcc 12 has the type in C only.
float from_f16(std::uint16_t x) {
    int exponent = x >> 10 & 31, fraction = x & 1023;
    float size = exponent == 0 ? std::ldexp(float(fraction), -24)
                 : exponent < 31 ? std::ldexp(float(fraction + 1024), exponent - 25)
                                 : fraction ? NAN : INFINITY;
    return x >> 15 ? -size : size;
}

std::uint16_t to_f16(float x) {
    std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    float size = std::fabs(x);
    if (x != x) return 0x7e00;
    if (size >= 65520) return sign | 0x7c00;
    int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    // Steps of the last place, to nearest, ties to even; a carry raises the exponent by itself.
    long steps = std::lrint(std::ldexp(size, 10 - exponent));
    return sign | static_cast<std::uint16_t>(steps + (size < 0x1p-14f ? 0 : ((exponent + 14) << 10)));
}

// Numbers of cuBLAS's types as f32.
enum Type { F32 = 0, F16 = 2, BF16 = 14 };

std::uint64_t bytes_of(int type) { return type == F32 ? 4 : 2; }

float number(const void *from, int type, std::uint64_t i) {
    if (type == F32) return static_cast<const float *>(from)[i];
    auto half = static_cast<const std::uint16_t *>(from)[i];
    return type == F16 ? from_f16(half) : from_bf16(half);
}

void store(void *to, int type, std::uint64_t i, float x) {
    if (type == F32) static_cast<float *>(to)[i] = x;
    else static_cast<std::uint16_t *>(to)[i] = type == F16 ? to_f16(x) : to_bf16(x);
}

const char *name_of(int type) { return type == F32 ? "f32" : type == F16 ? "f16" : "bf16"; }

struct Handle {
    void *stream = nullptr;
};

} // namespace

extern "C" {

// ---- cuBLAS. 0 is success, 7 an invalid value, 15 not supported, 14 an internal error.

int cublasCreate_v2(void **handle) {
    *handle = new Handle;
    return 0;
}

int cublasDestroy_v2(void *handle) {
    delete static_cast<Handle *>(handle);
    return 0;
}

int cublasSetStream_v2(void *handle, void *stream) {
    static_cast<Handle *>(handle)->stream = stream;
    return 0;
}

// C = alpha * op(A) * op(B) + beta * C for each of a batch; columns are contiguous.
int cublasGemmStridedBatchedEx(void *handle, int trans_a, int trans_b, int m, int n, int k, const void *alpha, const void *a,
                               int type_a, int lda, long long stride_a, const void *b, int type_b, int ldb, long long stride_b,
                               const void *beta, void *c, int type_c, int ldc, long long stride_c, int batch, int compute,
                               int) {
    LOCKED;
    constexpr int COMPUTE_16F = 64;
    for (int type : {type_a, type_b, type_c})
        if (type != F32 && type != F16 && type != BF16) return 15;
    if (m <= 0 || n <= 0 || k <= 0 || batch <= 0) return 7;
    // A stride of a later row or column is at least the length of an earlier one.
    if (lda < (trans_a ? k : m) || ldb < (trans_b ? n : k) || ldc < m) return 7;
    auto scale = [&](const void *at) { return number(at, compute == COMPUTE_16F ? F16 : F32, 0); };
    float by = scale(alpha), keep = scale(beta);
    Step step(static_cast<Handle *>(handle)->stream);
    auto extent = [&](long long stride, int ld, int rows, int columns, int type) {
        return (stride * (batch - 1) + std::uint64_t(ld) * (columns - 1) + rows) * bytes_of(type);
    };
    if (!step.reads(a, extent(stride_a, lda, trans_a ? k : m, trans_a ? m : k, type_a)) ||
        !step.reads(b, extent(stride_b, ldb, trans_b ? n : k, trans_b ? k : n, type_b)) ||
        !step.writes(c, extent(stride_c, ldc, m, n, type_c)) || !step.ordered("a matrix product"))
        return 14;
    count(std::string("product ") + name_of(type_a) + " to " + name_of(type_c), batch);
    count("products");
    std::vector<float> rows(std::size_t(m) * k), column(k);
    for (int i = 0; i < batch; i++) {
        for (int row = 0; row < m; row++)
            for (int p = 0; p < k; p++) {
                std::uint64_t at = trans_a ? std::uint64_t(row) * lda + p : std::uint64_t(p) * lda + row;
                rows[std::size_t(row) * k + p] = number(a, type_a, stride_a * i + at);
            }
        for (int j = 0; j < n; j++) {
            for (int p = 0; p < k; p++) {
                std::uint64_t at = trans_b ? std::uint64_t(p) * ldb + j : std::uint64_t(j) * ldb + p;
                column[p] = number(b, type_b, stride_b * i + at);
            }
            for (int row = 0; row < m; row++) {
                float sum = 0;
                for (int p = 0; p < k; p++) sum += rows[std::size_t(row) * k + p] * column[p];
                std::uint64_t at = stride_c * i + std::uint64_t(j) * ldc + row;
                store(c, type_c, at, by * sum + (keep == 0 ? 0 : keep * number(c, type_c, at)));
            }
        }
    }
    return 0;
}

// ---- cuRAND: opened with each device, and never asked for a number (`vilg` draws on the host).

int curandCreateGenerator(void **generator, int) {
    *generator = generator;
    return 0;
}
int curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { return 0; }
int curandSetStream(void *, void *) { return 0; }
int curandDestroyGenerator(void *) { return 0; }

} // extern "C"

// ---- NCCL: ranks are threads or processes that meet in shared memory.

namespace {

constexpr std::uint64_t SLOT = 256ull << 20; // the largest part of a message
constexpr int MOST_RANKS = 16;
constexpr auto LIMIT = std::chrono::seconds(120);

struct Meeting {
    std::atomic<unsigned> arrived, round, left;
};

struct Comm {
    int rank, ranks;
    Meeting *meeting;
    char *slots;
    std::string name;
};

std::uint64_t size_of(int type) { return type < 2 ? 1 : type == 6 || type == 9 ? 2 : type == 4 || type == 5 || type == 8 ? 8 : 4; }

bool meet(Comm &comm) {
    unsigned round = comm.meeting->round;
    if (comm.meeting->arrived.fetch_add(1) + 1 == unsigned(comm.ranks)) {
        comm.meeting->arrived = 0;
        comm.meeting->round++;
        return true;
    }
    auto begun = std::chrono::steady_clock::now();
    while (comm.meeting->round == round) {
        if (std::chrono::steady_clock::now() - begun > LIMIT) return complain("a rank waits for others in vain");
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    return true;
}

// Gives `bytes` to the others and calls `use` with the message of each rank, part by part.
bool exchange(Comm &comm, const void *ours, std::uint64_t bytes, const std::function<void(int, const char *, std::uint64_t, std::uint64_t)> &use) {
    for (std::uint64_t at = 0; at < bytes || at == 0; at += SLOT) {
        std::uint64_t part = std::min(SLOT, bytes - at);
        if (ours) std::memcpy(comm.slots + SLOT * comm.rank, static_cast<const char *>(ours) + at, part);
        if (!meet(comm)) return false;
        for (int rank = 0; rank < comm.ranks; rank++) use(rank, comm.slots + SLOT * rank, at, part);
        if (!meet(comm)) return false;
    }
    return true;
}

thread_local int groups;
thread_local std::vector<std::function<bool()>> queued;

int submit(std::function<bool()> work) {
    if (groups > 0) {
        queued.push_back(std::move(work));
        return 0;
    }
    return work() ? 0 : 2;
}

// Notes the memory that a collective uses, in the order of its stream.
bool noted(void *stream, const void *from, std::uint64_t read, void *to, std::uint64_t written, const char *what) {
    LOCKED;
    count(std::string("NCCL ") + what);
    count(std::string("bytes of NCCL ") + what, std::max(read, written));
    Step step(stream);
    return (!from || step.reads(from, read)) && (!to || step.writes(to, written)) && step.ordered(what);
}

// Adds a part of a message of f32 to a sum.
void add(float *sum, int rank, const char *message, std::uint64_t bytes) {
    auto *numbers = reinterpret_cast<const float *>(message);
    for (std::uint64_t i = 0; i < bytes / 4; i++) sum[i] = rank == 0 ? numbers[i] : sum[i] + numbers[i];
}

constexpr int F32_OF_NCCL = 7, SUM = 0, INVALID = 4;

} // namespace

extern "C" {

struct ncclUniqueId {
    char bytes[128];
};

int ncclGetVersion(int *version) {
    *version = 22805;
    return 0;
}

const char *ncclGetErrorString(int) { return "the emulated NCCL refuses (see stderr)"; }

int ncclGetUniqueId(ncclUniqueId *id) {
    static std::atomic<int> made;
    std::memset(id, 0, sizeof *id);
    std::snprintf(id->bytes, sizeof id->bytes, "/emulated-nccl-%d-%d", getpid(), made++);
    return 0;
}

int ncclCommInitRank(void **made, int ranks, ncclUniqueId id, int rank) {
    if (ranks < 1 || ranks > MOST_RANKS || rank < 0 || rank >= ranks) return INVALID;
    std::uint64_t bytes = 4096 + SLOT * ranks;
    int file = shm_open(id.bytes, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, bytes) != 0) return 2;
    void *at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    close(file);
    if (at == MAP_FAILED) return 2;
    auto *comm = new Comm{rank, ranks, static_cast<Meeting *>(at), static_cast<char *>(at) + 4096, id.bytes};
    *made = comm;
    if (!meet(*comm)) return 2;
    // All have it open: its name can go.
    if (rank == 0) shm_unlink(id.bytes);
    return 0;
}

int ncclCommDestroy(void *of) {
    auto *comm = static_cast<Comm *>(of);
    munmap(comm->meeting, 4096 + SLOT * comm->ranks);
    delete comm;
    return 0;
}

int ncclCommAbort(void *comm) { return ncclCommDestroy(comm); }

int ncclCommGetAsyncError(void *, int *code) {
    *code = 0;
    return 0;
}

int ncclGroupStart() {
    groups++;
    return 0;
}

int ncclGroupEnd() {
    if (--groups > 0) return 0;
    auto works = std::move(queued);
    queued.clear();
    for (auto &work : works)
        if (!work()) return 2;
    return 0;
}

int ncclAllGather(const void *ours, void *all, std::size_t count, int type, void *of, void *stream) {
    auto &comm = *static_cast<Comm *>(of);
    std::uint64_t bytes = count * size_of(type);
    return submit([=, &comm] {
        return noted(stream, ours, bytes, all, bytes * comm.ranks, "all-gather") &&
               exchange(comm, ours, bytes, [&](int rank, const char *message, std::uint64_t at, std::uint64_t part) {
                   std::memcpy(static_cast<char *>(all) + bytes * rank + at, message, part);
               });
    });
}

int ncclBroadcast(const void *ours, void *to, std::size_t count, int type, int root, void *of, void *stream) {
    auto &comm = *static_cast<Comm *>(of);
    std::uint64_t bytes = count * size_of(type);
    return submit([=, &comm] {
        const void *from = comm.rank == root ? ours : nullptr;
        return noted(stream, from, bytes, to, bytes, "broadcast") &&
               exchange(comm, from, bytes, [&](int rank, const char *message, std::uint64_t at, std::uint64_t part) {
                   if (rank == root) std::memcpy(static_cast<char *>(to) + at, message, part);
               });
    });
}

int ncclAllReduce(const void *ours, void *sum, std::size_t count, int type, int op, void *of, void *stream) {
    auto &comm = *static_cast<Comm *>(of);
    if (type != F32_OF_NCCL || op != SUM) return INVALID;
    std::uint64_t bytes = count * 4;
    return submit([=, &comm] {
        return noted(stream, ours, bytes, sum, bytes, "all-reduce") &&
               exchange(comm, ours, bytes, [&](int rank, const char *message, std::uint64_t at, std::uint64_t part) {
                   add(static_cast<float *>(sum) + at / 4, rank, message, part);
               });
    });
}

int ncclReduce(const void *ours, void *sum, std::size_t count, int type, int op, int root, void *of, void *stream) {
    auto &comm = *static_cast<Comm *>(of);
    if (type != F32_OF_NCCL || op != SUM) return INVALID;
    std::uint64_t bytes = count * 4;
    return submit([=, &comm] {
        void *to = comm.rank == root ? sum : nullptr;
        return noted(stream, ours, bytes, to, bytes, "reduce") &&
               exchange(comm, ours, bytes, [&](int rank, const char *message, std::uint64_t at, std::uint64_t part) {
                   if (to) add(static_cast<float *>(to) + at / 4, rank, message, part);
               });
    });
}

int ncclReduceScatter(const void *all, void *ours, std::size_t count, int type, int op, void *of, void *stream) {
    auto &comm = *static_cast<Comm *>(of);
    if (type != F32_OF_NCCL || op != SUM) return INVALID;
    std::uint64_t part = count * 4, bytes = part * comm.ranks;
    if (bytes > SLOT) return INVALID;
    return submit([=, &comm] {
        return noted(stream, all, bytes, ours, part, "reduce-scatter") &&
               exchange(comm, all, bytes, [&](int rank, const char *message, std::uint64_t, std::uint64_t) {
                   add(static_cast<float *>(ours), rank, message + part * comm.rank, part);
               });
    });
}

} // extern "C"
