// Threads: torch's own where its OpenMP runtime can be reached, else some that live as long as a call.
#pragma once

#include <cstdint>
#include <functional>

namespace reattn {

// To be called once, before any fork: a child process takes threads of its own.
void watch_forks();

// Uses the OpenMP runtime that a loaded library depends on, so that its threads and ours are the same and never
// compete; false if there is none that exports GOMP_parallel (GNU's, LLVM's and Intel's do), and in a forked process.
bool use_openmp_of(const char* library);

// Calls work(thread, unit) once for each unit, on up to `threads` threads numbered from 0. work must not throw.
void parallel_for(int threads, int64_t units, const std::function<void(int, int64_t)>& work);

// Whether the last call of use_openmp_of succeeded and this process was not forked since.
bool uses_openmp();

}  // namespace reattn
