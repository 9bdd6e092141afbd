#include "objects.hpp"

namespace expertwire::python {

namespace {

using Object = Closable<LowLatency>;
constexpr std::initializer_list<const char*> kOutputs = {"x", "tokens_per_expert", "ranges",
                                                         "source_tokens", "scales"};

LowLatencyOptions options_of(const Arguments& given) {
  return {given.shape(), given.value("lanes", 1), given.value("threads", 0), given.value("sms", 0)};
}

Object create(const Closable<Communicator>& communicator, const nb::kwargs& kwargs) {
  const auto held = communicator.get();
  const LowLatencyOptions options = options_of(Arguments(kwargs));
  nb::gil_scoped_release release;
  return Object(std::shared_ptr<LowLatency>(LowLatency::create(held, options)));
}

nb::object dispatch(const Object& self, const nb::kwargs& kwargs) {
  const auto object = self.get();
  const Arguments given(kwargs);
  const GivenOutputs out(given.object("out"));
  out.check_names(kOutputs);
  PythonAllocator give(given.object("allocator"), given.object("x"));
  LowLatency::DispatchRequest request;
  given.fill(request);
  request.x = given.view("x");
  request.topk_idx = given.view("topk_idx");
  request.topk_weights = given.view("topk_weights");
  request.x_scales = given.view("x_scales");
  request.experts = given.value("experts", 0);
  request.max_tokens = given.value("max_tokens", 0);
  request.cast_to_fp8 = given.value("cast_to_fp8", false);
  request.send_only = given.value("send_only", false);
  request.outputs = {out.view("x"), out.view("tokens_per_expert"), out.view("ranges"),
                     out.view("source_tokens"), out.view("scales")};
  request.allocator = Allocator::of(give);
  LowLatency::DispatchResult result;
  {
    nb::gil_scoped_release release;
    result = object->dispatch(request);
    result.owner.reset();  // the arrays are kept by name
  }
  nb::dict fields;
  for (const char* name : kOutputs) fields[name] = output(name, out, give);
  fields["handle"] = nb::cast(std::move(result.handle));
  const nb::object made = make_result("LowLatencyDispatch", fields);
  keep_until_run(request.stream, kwargs, made);
  return made;
}

nb::object combine(const Object& self, const nb::kwargs& kwargs) {
  const auto object = self.get();
  const Arguments given(kwargs);
  PythonAllocator give(given.object("allocator"), given.object("y"));
  LowLatency::CombineRequest request;
  given.fill(request);
  request.y = given.view("y");
  request.handle = handle_of(given.object("handle"));
  request.topk_weights = given.view("topk_weights");
  request.bias = given.view("bias");
  request.out = given.view("out", Use::write);
  request.send_only = given.value("send_only", false);
  request.allocator = Allocator::of(give);
  {
    nb::gil_scoped_release release;
    object->combine(request);
  }
  const nb::object made = either(given.object("out"), give.made("out"));
  keep_until_run(request.stream, kwargs, made);
  return made;
}

}  // namespace

void bind_low_latency(nb::module_& module) {
  nb::class_<Object>(module, "LowLatency")
      .def_static("create", &create)
      .def_static("memory_bytes",
                  [](int ranks, const nb::kwargs& kwargs) {
                    return LowLatency::memory_bytes(options_of(Arguments(kwargs)), ranks);
                  })
      .def("dispatch", &dispatch)
      .def("combine", &combine)
      .def("receive", &call_with_handle<LowLatency, &LowLatency::receive>, nb::arg("handle").none(),
           nb::arg("stream").none())
      .def("status", &status_of<LowLatency>)
      .def("close", &Object::close);
}

}  // namespace expertwire::python
