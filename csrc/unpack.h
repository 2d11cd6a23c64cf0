// Python's arguments as those of a function of the core: numbers, the address for a pointer, and
// for a struct a tuple with an item for each of its fields, in their order.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace quietstar {

// Stands for a value of any type, to count the fields of a struct by.
struct Anything {
  template <class T>
  operator T() const;
};

template <class Struct, class... Fields>
constexpr auto takes(int) -> decltype(Struct{Fields{}...}, true) {
  return true;
}
template <class Struct, class... Fields>
constexpr bool takes(...) {
  return false;
}

template <class Struct, class... Fields>
constexpr std::size_t field_count() {
  if constexpr (takes<Struct, Fields..., Anything>(0)) {
    return field_count<Struct, Fields..., Anything>();
  } else {
    return sizeof...(Fields);
  }
}

template <class T>
T unpack(pybind11::handle value);

// Becomes the field that it initializes.
struct Item {
  pybind11::handle value;
  template <class T>
  operator T() const {
    return unpack<T>(value);
  }
};

inline pybind11::tuple tuple_of(pybind11::handle value, std::size_t count) {
  auto items = value.cast<pybind11::tuple>();
  if (items.size() != count) {
    throw std::invalid_argument("a call of the native module has " + std::to_string(items.size()) +
                                " items; expected " + std::to_string(count));
  }
  return items;
}

template <class Struct, std::size_t... i>
Struct unpack_fields(const pybind11::tuple& items, std::index_sequence<i...>) {
  return {Item{items[i]}...};
}

template <class T>
T unpack(pybind11::handle value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value.cast<std::uintptr_t>());
  } else if constexpr (std::is_enum_v<T>) {
    return static_cast<T>(value.cast<std::underlying_type_t<T>>());
  } else if constexpr (std::is_class_v<T>) {
    constexpr std::size_t count = field_count<T>();
    return unpack_fields<T>(tuple_of(value, count), std::make_index_sequence<count>());
  } else if constexpr (std::is_same_v<T, std::uint64_t>) {
    return static_cast<T>(value.cast<std::int64_t>());  // as torch has it
  } else {
    return value.cast<T>();
  }
}

template <class... Parameters, std::size_t... i>
std::tuple<std::decay_t<Parameters>...> unpack_arguments(const pybind11::tuple& items,
                                                         std::index_sequence<i...>) {
  return {unpack<std::decay_t<Parameters>>(items[i])...};
}

// Defines name(...) in a module: calls the function, without Python's lock.
template <class Result, class... Parameters>
void bind(pybind11::module_& m, const char* name, Result (*function)(Parameters...)) {
  m.def(name, [function](const pybind11::args& arguments) {
    const auto values = unpack_arguments<Parameters...>(tuple_of(arguments, sizeof...(Parameters)),
                                                        std::index_sequence_for<Parameters...>());
    const pybind11::gil_scoped_release release;
    return std::apply(function, values);
  });
}

}  // namespace quietstar
