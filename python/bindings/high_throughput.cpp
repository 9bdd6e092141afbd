
#include "objects.hpp"

namespace expertwire::python {

namespace {

using Object = Closable<HighThroughput>;
constexpr std::initializer_list<const char*> kOutputs = {"x", "source_tokens", "topk_experts",
                                                         "topk_weights", "scales"};

HighThroughputOptions options_of(const Arguments& given) {
  HighThroughputOptions options{given.shape()};
  options.lanes = given.value("lanes", 1);
  options.pool_rows = given.value("pool_rows", std::int64_t{0});
  options.threads = given.value("threads", 0);
  options.sms = given.value("sms", 0);
  options.ring_frames = given.value("ring_frames", 0);
  return options;
}

/// What views of the library's memory need: rows of a pool lie in its object.
struct Held {
  std::shared_ptr<HighThroughput> object;
  Handle handle;
  std::shared_ptr<void> owner;
};

HighThroughput::Layout layout_of(const Arguments& given) {
  const auto name = given.value("layout", std::string("token_major"));
  if (name == "token_major") return HighThroughput::Layout::token_major;
  if (name == "expert_major") return HighThroughput::Layout::expert_major;
  throw Error(ErrorCode::invalid_argument,
              "layout is \"" + name + "\"; it must be \"token_major\" or \"expert_major\"");
}

TensorView placed(const TensorView& view, int device) {
  return view.present() ? view.on(device) : view;
}

nb::object dispatch(const Object& self, const nb::kwargs& kwargs) {
  const auto object = self.get();
  const Arguments given(kwargs);
  const GivenOutputs out(given.object("out"));
  out.check_names(kOutputs);
  PythonAllocator give(given.object("allocator"), given.object("x"));
  HighThroughput::DispatchRequest request;
  fill_dispatch(request, given, give);
  request.cached = handle_of(given.object("cached"));
  const bool pool = given.value("pool", false);
  request.output = pool ? HighThroughput::Output::pool : HighThroughput::Output::owned;
  request.layout = layout_of(given);
  request.expert_alignment = given.value("expert_alignment", 1);
  request.capacity = given.maybe<std::int64_t>("capacity");
  request.outputs = {out.view("x"), out.view("source_tokens"), out.view("topk_experts"),
                     out.view("topk_weights"), out.view("scales")};
  HighThroughput::DispatchResult result;
  {
    nb::gil_scoped_release release;
    result = object->dispatch(request);
  }
  const int device = given.value("device", kHost);
  const auto held = std::make_shared<Held>(Held{object, result.handle, result.owner});
  const auto& o = result.outputs;
  const TensorView views[] = {o.x, o.source_tokens, o.topk_experts, o.topk_weights, o.scales};
  const TensorView* view = views;
  nb::dict fields;
  for (const char* name : kOutputs) {
    fields[name] = pool ? export_view(placed(*view, device), held) : output(name, out, give);
    ++view;
  }
  const auto kept = [&](const TensorView& values) -> nb::object {
    return values.present() ? export_view(placed(values, device), held) : nb::none();
  };
  fields["needed_rows"] = kept(result.needed_rows);
  fields["source_offsets"] = kept(result.source_offsets);
  fields["expert_offsets"] = kept(result.expert_offsets);
  fields["group_offsets"] = kept(result.group_offsets);
  fields["rows_per_source"] = result.rows_per_source;
  fields["rows_per_expert"] = result.rows_per_expert;
  fields["handle"] = nb::cast(result.handle);
  const nb::object made = make_result("HighThroughputDispatch", fields);
  keep_until_run(request.stream, kwargs, made);
  return made;
}

nb::object combine(const Object& self, const nb::kwargs& kwargs) {
  const auto object = self.get();
  const Arguments given(kwargs);
  PythonAllocator give(given.object("allocator"), given.object("y"));
  HighThroughput::CombineRequest request;
  fill_combine(request, given, give);
  request.row_weights = given.view("row_weights");
  request.out_topk_weights = given.view("out_topk_weights", Use::write);
  {
    nb::gil_scoped_release release;
    object->combine(request);
  }
  nb::dict fields;
  fields["out"] = either(given.object("out"), give.made("out"));
  fields["topk_weights"] = either(given.object("out_topk_weights"), give.made("out_topk_weights"));
  const nb::object made = make_result("HighThroughputCombine", fields);
  keep_until_run(request.stream, kwargs, made);
  return made;
}

}  // namespace

void bind_high_throughput(nb::module_& module) {
  bind_mode<HighThroughput, options_of>(module, "HighThroughput")
      .def("dispatch", &dispatch)
      .def("combine", &combine)
      .def("release", &call_with_handle<HighThroughput, &HighThroughput::release>,
           nb::arg("handle").none(), nb::arg("stream").none());
}

}  // namespace expertwire::python
