// Stands for libcuda.so.1 where there is no GPU: notes each call in the file that FAKE_CUDA_LOG names. FAKE_CUDA says
// what is not as usual, as in "cuInit=100 cuLaunchKernel!201 cuDriverGetVersion:12080": the status of every call, that
// of the first one alone, or the number that is told.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace {

// What FAKE_CUDA has after the call's name and this sign, or else the number given.
long told(const std::string& name, char sign, long otherwise) {
  const char* all = std::getenv("FAKE_CUDA");
  const std::string words = std::string(" ") + (all ? all : ""), word = " " + name + sign;
  const size_t at = words.find(word);
  return at == std::string::npos ? otherwise : std::atol(words.c_str() + at + word.size());
}

template <class... Numbers>
int note(const char* name, const char* format, Numbers... numbers) {
  static std::map<std::string, int> times;
  if (const char* path = std::getenv("FAKE_CUDA_LOG"))
    if (FILE* log = std::fopen(path, "a")) {
      std::fprintf(log, "%s", name);
      std::fprintf(log, format, numbers...);
      std::fprintf(log, "\n");
      std::fclose(log);
    }
  const bool first = times[name]++ == 0;
  return int(told(name, '=', told(name, '!', 0) * first));
}

int init(unsigned flags) { return note("cuInit", " %u", flags); }
int driver_version(int* version) {
  *version = int(told("cuDriverGetVersion", ':', 13000));
  return note("cuDriverGetVersion", "");
}
int device_count(int* count) {
  *count = int(told("cuDeviceGetCount", ':', 1));
  return note("cuDeviceGetCount", "");
}
int device(int* device, int ordinal) {
  *device = ordinal;
  return note("cuDeviceGet", " %d", ordinal);
}
int device_attribute(int* value, int attribute, int device) {
  *value = attribute == 97 ? 232448 : 132;
  return note("cuDeviceGetAttribute", " %d %d", attribute, device);
}
int retain_context(void** context, int device) {
  *context = reinterpret_cast<void*>(uintptr_t(0xC0 + device));
  return note("cuDevicePrimaryCtxRetain", " %d", device);
}
int set_context(void* context) { return note("cuCtxSetCurrent", " %p", context); }
// The first bytes of what is loaded, which is CUBIN, an ELF file, or the text of PTX.
int load(void** module, const char* image) {
  *module = reinterpret_cast<void*>(uintptr_t(0x10));
  return note("cuModuleLoadData", " %s", std::memcmp(image, "\177ELF", 4) ? "PTX" : "CUBIN");
}
int function(void** function, void* module, const char* name) {
  static uintptr_t next = 0xF0;
  *function = reinterpret_cast<void*>(next++);
  return note("cuModuleGetFunction", " %p %s", module, name);
}
int set_function_attribute(void* function, int attribute, int value) {
  return note("cuFuncSetAttribute", " %p %d %d", function, attribute, value);
}
int launch(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned bytes,
           void* stream, void** arguments, void**) {
  int64_t first;
  std::memcpy(&first, arguments[0], sizeof first);
  return note("cuLaunchKernel", " %p %u,%u,%u %u %u %p %lld", function, x, y, z, threads, bytes, stream,
              static_cast<long long>(first));
}
int error_string(int status, const char** text) {
  *text = status == 1 ? "invalid argument" : "as the driver says";
  return 0;
}
int unknown() { return 999; }

const std::map<std::string, void*> kCalls = {
    {"cuInit", (void*)init},
    {"cuDriverGetVersion", (void*)driver_version},
    {"cuDeviceGetCount", (void*)device_count},
    {"cuDeviceGet", (void*)device},
    {"cuDeviceGetAttribute", (void*)device_attribute},
    {"cuDevicePrimaryCtxRetain", (void*)retain_context},
    {"cuCtxSetCurrent", (void*)set_context},
    {"cuModuleLoadData", (void*)load},
    {"cuModuleGetFunction", (void*)function},
    {"cuFuncSetAttribute", (void*)set_function_attribute},
    {"cuLaunchKernel", (void*)launch},
    {"cuGetErrorString", (void*)error_string},
};

}  // namespace

extern "C" __attribute__((visibility("default"))) int cuGetProcAddress_v2(const char* name, void** function, int,
                                                                          uint64_t, int* found) {
  const auto call = kCalls.find(name);
  *function = call == kCalls.end() ? (void*)unknown : call->second;
  if (found) *found = 0;
  return 0;
}
