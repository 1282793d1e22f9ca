// What the emulated libraries need of the emulated driver.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace emulated {

// One call at a time.
extern std::recursive_mutex mutex;

// Adds to what EMULATED_GPU_LOG reports.
void count(const std::string &what, std::uint64_t times = 1);

// Says on stderr what is wrong; returns false.
bool complain(const std::string &what);

// One piece of work on a stream. It notes what memory it uses; `ordered` then says whether events order it with other streams.
class Step {
  public:
    explicit Step(void *stream);
    bool reads(const void *address, std::uint64_t bytes);
    bool writes(void *address, std::uint64_t bytes);
    bool ordered(const std::string &what);

  private:
    bool uses(const void *address, std::uint64_t bytes, bool write);
    void *stream;
};

} // namespace emulated
