// One entry for each kernel, compiled once for each element type.
#pragma once

#include "params.h"

namespace reattn {

struct Half;
struct BFloat16;

struct Launch {
  int64_t blocks;
  int chunks;  // of the output's columns
  uint64_t stream;
};

template <class T>
void forward(const Params& p, const Launch& how);
template <class T>
void add_up(const Params& p, const Launch& how);
template <class T>
void finish(const Params& p, const Launch& how);
template <class T>
void grad_sums(const Params& p, const Launch& how);
template <class T>
void backward_query(const Params& p, const Launch& how);
template <class T>
void backward_key(const Params& p, const Launch& how);
template <class T>
void unfold(const Params& p, const Launch& how);
template <class T>
void check_device();

}  // namespace reattn
