#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace reattn {
namespace {

using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<OpenMpParallel> openmp_parallel{nullptr};

std::atomic<bool> forked{false};

struct Region {
  int64_t units;
  const std::function<void(int, int64_t)>& work;
  std::atomic<int> threads{0};
  std::atomic<int64_t> next{0};
};

// Units go to whichever thread is free; what they compute does not depend on it.
void take_units(void* argument) {
  Region& region = *static_cast<Region*>(argument);
  const int thread = region.threads++;
  for (int64_t unit; (unit = region.next++) < region.units;) region.work(thread, unit);
}

}  // namespace

void watch_forks() {
  // A child has none of the threads that the runtime believes in, and would wait for them.
  pthread_atfork(nullptr, nullptr, [] {
    forked = true;
    openmp_parallel = nullptr;
  });
}

bool use_openmp_of(const char* library) {
  void* handle = forked ? nullptr : dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  openmp_parallel = handle ? reinterpret_cast<OpenMpParallel>(dlsym(handle, "GOMP_parallel")) : nullptr;
  if (handle) dlclose(handle);
  return openmp_parallel != nullptr;
}

bool uses_openmp() { return openmp_parallel != nullptr; }

void parallel_for(int threads, int64_t units, const std::function<void(int, int64_t)>& work) {
  Region region{units, work};
  const int useful = int(units < threads ? units : threads);
  if (useful <= 1) return take_units(&region);
  // Inside a parallel region of the caller's the runtime may start fewer threads: those take all units.
  if (const OpenMpParallel parallel = openmp_parallel) return parallel(take_units, &region, unsigned(useful), 0);
  std::vector<std::thread> others;
  others.reserve(size_t(useful) - 1);
  try {
    for (int i = 1; i < useful; i++) others.emplace_back(take_units, &region);
  } catch (const std::exception&) {
    // As many as the system gives.
  }
  take_units(&region);
  for (std::thread& other : others) other.join();
}

}  // namespace reattn
