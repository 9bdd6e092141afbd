
#include <cmath>
#include <cstring>

#include "common.hpp"

namespace expertwire::python {

namespace {

using Shared = Closable<Communicator>;
/// Its end waits for what is queued, which may want the lock of the interpreter.
using HeldQueue = Closable<Queue>;

/// What a communicator is made with, by keyword; None is as if it were not given.
CommunicatorOptions options_of(const nb::kwargs& settings) {
  const Arguments given(settings);
  given.expect_only({"cuda_device", "arena_bytes", "ranks_per_node", "staged_pairs", "timeout"});
  CommunicatorOptions options;
  options.cuda_device = given.maybe<int>("cuda_device");
  options.arena_bytes = given.maybe<std::size_t>("arena_bytes");
  options.ranks_per_node = given.maybe<int>("ranks_per_node");
  options.staged_pairs = given.maybe<std::string>("staged_pairs");
  options.timeout = timeout_of(given.maybe<double>("timeout"));
  return options;
}

Shared create(std::shared_ptr<Bootstrap> bootstrap, const CommunicatorOptions& options) {
  nb::gil_scoped_release release;
  return Shared(Communicator::create(std::move(bootstrap), options));
}

/// Over `all_gather(bytes) -> [bytes of every rank]`.
std::shared_ptr<Bootstrap> bootstrap_over(int rank, int size, nb::callable all_gather) {
  CallbackRequest request;
  request.rank = rank;
  request.size = size;
  const std::shared_ptr<void> held = keep(all_gather);
  request.all_gather = [held, rank, size](void* data, std::size_t bytes, Deadline) {
    nb::gil_scoped_acquire gil;
    auto* all = static_cast<char*>(data);
    const nb::handle gather(static_cast<PyObject*>(held.get()));
    const nb::object parts = gather(nb::bytes(all + static_cast<std::size_t>(rank) * bytes, bytes));
    if (nb::len(parts) != static_cast<std::size_t>(size))
      throw Error(ErrorCode::invalid_argument, "all_gather gave " + std::to_string(nb::len(parts)) +
                                                   " parts for " + std::to_string(size) + " ranks");
    for (std::size_t r = 0; r < static_cast<std::size_t>(size); ++r) {
      const auto part = nb::cast<nb::bytes>(parts[r]);
      if (part.size() != bytes)
        throw Error(ErrorCode::mismatch, "all_gather gave " + std::to_string(part.size()) +
                                             " bytes of rank " + std::to_string(r) +
                                             "; it must be " + std::to_string(bytes));
      std::memcpy(all + r * bytes, part.data(), bytes);
    }
  };
  return bootstrap_from_callback(std::move(request));
}

}  // namespace

Stream stream_of(nb::handle stream) {
  if (stream.is_none()) return {};
  if (nb::isinstance<HeldQueue>(stream)) return {*nb::cast<HeldQueue&>(stream).get()};
  if (nb::isinstance<nb::int_>(stream))
    return Stream::cuda(reinterpret_cast<void*>(nb::cast<std::uintptr_t>(stream)));
  if (nb::hasattr(stream, "cuda_stream"))
    return Stream::cuda(
        reinterpret_cast<void*>(nb::cast<std::uintptr_t>(stream.attr("cuda_stream"))));
  throw Error(ErrorCode::invalid_argument,
              "stream must be None, a Queue, a CUDA stream of torch or its handle as an int");
}

void keep_until_run(const Stream& stream, const nb::kwargs& given, const nb::object& result) {
  if (stream.queue() == nullptr) return;
  stream.queue()->enqueue([held = keep(nb::make_tuple(given, result))] {});
}

std::optional<std::chrono::milliseconds> timeout_of(std::optional<double> seconds) {
  if (!seconds) return std::nullopt;
  constexpr double kMost = 1e9;
  if (!(*seconds > 0 && *seconds <= kMost))
    throw Error(ErrorCode::invalid_argument, "timeout is " + std::to_string(*seconds) +
                                                 " seconds; it must be above 0 and at most 1e9");
  return std::chrono::milliseconds(static_cast<std::int64_t>(std::ceil(*seconds * 1e3)));
}

void bind_communicator(nb::module_& module) {
  nb::class_<Bootstrap>(module, "Bootstrap", "How the ranks of a job find each other.")
      .def_prop_ro("rank", &Bootstrap::rank)
      .def_prop_ro("size", &Bootstrap::size);

  nb::class_<HeldQueue>(module, "Queue",
                        "A queue of work beside the calling thread: the CPU backend's stream.")
      .def("__init__", [](HeldQueue* self) { new (self) HeldQueue(std::make_shared<Queue>()); })
      .def(
          "_keep",
          [](const HeldQueue& self, nb::object object) {
            self.get()->enqueue([held = keep(std::move(object))] {});
          },
          "Keeps an object until what is queued so far has run.")
      .def(
          "synchronize",
          [](const HeldQueue& self) {
            const auto queue = self.get();
            nb::gil_scoped_release release;
            queue->synchronize();
          },
          "Returns when all that is queued has run; raises the first error since the last call.");

  module.def("in_process", &bootstrap_in_process, nb::arg("size"),
             "Bootstraps of `size` ranks that are threads of this process.");
  module.def("cuda_device_count", &cuda_device_count,
             "CUDA devices that this process sees; 0 in builds without CUDA. Touches the driver.");

  nb::class_<Shared>(module, "Communicator")
      .def_static(
          "from_bootstrap",
          [](std::shared_ptr<Bootstrap> bootstrap, const nb::kwargs& settings) {
            return create(std::move(bootstrap), options_of(settings));
          },
          nb::arg("bootstrap"), nb::arg("settings"))
      .def_static(
          "from_environment",
          [](const nb::kwargs& settings) {
            const CommunicatorOptions options = options_of(settings);
            std::shared_ptr<Bootstrap> bootstrap;
            {
              nb::gil_scoped_release release;
              bootstrap = bootstrap_from_environment();
            }
            return create(std::move(bootstrap), options);
          },
          nb::arg("settings"))
      .def_static(
          "from_all_gather",
          [](int rank, int size, nb::callable all_gather, const nb::kwargs& settings) {
            const CommunicatorOptions options = options_of(settings);
            return create(bootstrap_over(rank, size, std::move(all_gather)), options);
          },
          nb::arg("rank"), nb::arg("size"), nb::arg("all_gather"), nb::arg("settings"))
      .def_prop_ro("rank", [](const Shared& c) { return c.get()->rank(); })
      .def_prop_ro("size", [](const Shared& c) { return c.get()->size(); })
      .def_prop_ro("nodes", [](const Shared& c) { return c.get()->topology().nodes(); })
      .def("node_of", [](const Shared& c, int rank) { return c.get()->topology().node_of(rank); })
      .def_prop_ro("cuda_device", [](const Shared& c) { return c.get()->cuda_device(); })
      .def_prop_ro(
          "timeout",
          [](const Shared& c) { return std::chrono::duration<double>(c.get()->timeout()).count(); })
      .def_prop_ro("banner", [](const Shared& c) { return c.get()->banner(); })
      .def_prop_ro("staged_pair", [](const Shared& c) { return c.get()->staged_pair(); })
      .def("path",
           [](const Shared& c, int peer) {
             const Path& path = c.get()->path(peer);
             return nb::make_tuple(std::string(to_string(path.kind)), path.transport, path.why);
           })
      .def("barrier",
           [](const Shared& c) {
             const auto communicator = c.get();
             nb::gil_scoped_release release;
             communicator->barrier();
           })
      .def("all_gather",
           [](const Shared& c, const nb::bytes& mine) {
             const auto communicator = c.get();
             const std::size_t bytes = mine.size();
             const auto size = static_cast<std::size_t>(communicator->size());
             std::string all(size * bytes, '\0');
             std::memcpy(&all[static_cast<std::size_t>(communicator->rank()) * bytes], mine.data(),
                         bytes);
             {
               nb::gil_scoped_release release;
               communicator->all_gather(all.data(), bytes);
             }
             nb::list parts;
             for (std::size_t r = 0; r < size; ++r) parts.append(nb::bytes(&all[r * bytes], bytes));
             return parts;
           })
      .def("close", &Shared::close);
}

}  // namespace expertwire::python
