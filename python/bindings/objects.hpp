#pragma once

#include "common.hpp"

namespace expertwire::python {

nb::object error_or_none(const std::optional<Error>& error);
nb::object describe_status(const Status& status);

template <class Object>
nb::object status_of(const Closable<Object>& self) {
  const auto object = self.get();
  Status status;
  {
    nb::gil_scoped_release release;
    status = object->status();
  }
  return describe_status(status);
}

/// An empty one for None.
inline Handle handle_of(nb::handle handle) {
  if (handle.is_none()) return {};
  if (!nb::isinstance<Handle>(handle))
    throw Error(ErrorCode::invalid_argument,
                "handle is a " + class_name(handle) + "; it must be the handle of a dispatch");
  return nb::cast<const Handle&>(handle);
}

/// What dispatches of both modes take.
template <class Request>
void fill_dispatch(Request& request, const Arguments& given, PythonAllocator& give) {
  given.fill(request);
  request.x = given.view("x");
  request.topk_idx = given.view("topk_idx");
  request.topk_weights = given.view("topk_weights");
  request.x_scales = given.view("x_scales");
  request.experts = given.value("experts", 0);
  request.allocator = Allocator::of(give);
}

/// What combines of both modes take.
template <class Request>
void fill_combine(Request& request, const Arguments& given, PythonAllocator& give) {
  given.fill(request);
  request.y = given.view("y");
  request.handle = handle_of(given.object("handle"));
  request.topk_weights = given.view("topk_weights");
  request.bias = given.view("bias");
  request.out = given.view("out", Use::write);
  request.allocator = Allocator::of(give);
}

/// A mode with what all have; its options are read by `kOptions`.
template <class Object, auto kOptions>
nb::class_<Closable<Object>> bind_mode(nb::module_& module, const char* name) {
  nb::class_<Closable<Object>> mode(module, name);
  mode.def_static("create",
                  [](const Closable<Communicator>& communicator, const nb::kwargs& kwargs) {
                    const auto held = communicator.get();
                    const auto options = kOptions(Arguments(kwargs));
                    nb::gil_scoped_release release;
                    return Closable<Object>(std::shared_ptr<Object>(Object::create(held, options)));
                  });
  mode.def_static("memory_bytes", [](int ranks, const nb::kwargs& kwargs) {
    return Object::memory_bytes(kOptions(Arguments(kwargs)), ranks);
  });
  mode.def("status", &status_of<Object>);
  mode.def("close", &Closable<Object>::close);
  return mode;
}

/// receive() and release().
template <class Object, void (Object::*kCall)(const Handle&, const Stream&)>
void call_with_handle(const Closable<Object>& self, nb::handle given, nb::handle stream) {
  const auto object = self.get();
  const Handle handle = handle_of(given);
  const Stream on = stream_of(stream);
  nb::gil_scoped_release release;
  ((*object).*kCall)(handle, on);
}

/// What a result is made of: the Python class `name` of expertwire._types, a field a value.
inline nb::object make_result(const char* name, const nb::dict& fields) {
  return nb::module_::import_("expertwire._types").attr(name)(**fields);
}

inline nb::object either(nb::object given, nb::object made) {
  return given.is_none() ? std::move(made) : std::move(given);
}

/// An output of a call: as the caller gave it, or as the allocator did.
inline nb::object output(const char* name, const GivenOutputs& out,
                         const PythonAllocator& allocator) {
  return out.present() ? out.array(name) : allocator.made(name);
}

}  // namespace expertwire::python
