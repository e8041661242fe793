// Which instantiation of a kernel a launch takes: each calls a function with the kernel's template arguments after the
// element type, as std::integral_constant.
#pragma once

#include <type_traits>

#include "params.h"

namespace reattn {

template <int kNumber>
using Constant = std::integral_constant<int, kNumber>;

// Padded heads, tiles of 16 own rows, whether the mixed maps are summed.
template <class T, class Function>
void choose_forward(const Params& p, Function function) {
  const auto choose = [&](auto sum) {
    if constexpr (sizeof(T) == 2)
      if (p.plan.own == 32) return function(Constant<16>(), Constant<2>(), sum);
    if (padded_heads(p.heads) == 16) return function(Constant<16>(), Constant<1>(), sum);
    function(Constant<32>(), Constant<1>(), sum);
  };
  p.fold.batch_statistics() ? choose(std::true_type()) : choose(std::false_type());
}

// Padded heads.
template <class Function>
void choose_backward(const Params& p, Function function) {
  padded_heads(p.heads) == 16 ? function(Constant<16>()) : function(Constant<32>());
}

}  // namespace reattn
