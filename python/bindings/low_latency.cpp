#include "objects.hpp"

namespace expertwire::python {

namespace {

using Object = Closable<LowLatency>;
constexpr std::initializer_list<const char*> kOutputs = {"x", "tokens_per_expert", "ranges",
                                                         "source_tokens", "scales"};

LowLatencyOptions options_of(const Arguments& given) {
  return {given.shape(), given.value("lanes", 1), given.value("threads", 0), given.value("sms", 0)};
}

nb::object dispatch(const Object& self, const nb::kwargs& kwargs) {
  const auto object = self.get();
  const Arguments given(kwargs);
  const GivenOutputs out(given.object("out"));
  out.check_names(kOutputs);
  PythonAllocator give(given.object("allocator"), given.object("x"));
  LowLatency::DispatchRequest request;
  fill_dispatch(request, given, give);
  request.max_tokens = given.value("max_tokens", 0);
  request.cast_to_fp8 = given.value("cast_to_fp8", false);
  request.send_only = given.value("send_only", false);
  request.outputs = {out.view("x"), out.view("tokens_per_expert"), out.view("ranges"),
                     out.view("source_tokens"), out.view("scales")};
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
  fill_combine(request, given, give);
  request.send_only = given.value("send_only", false);
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
  bind_mode<LowLatency, options_of>(module, "LowLatency")
      .def("dispatch", &dispatch)
      .def("combine", &combine)
      .def("receive", &call_with_handle<LowLatency, &LowLatency::receive>, nb::arg("handle").none(),
           nb::arg("stream").none());
}

}  // namespace expertwire::python
