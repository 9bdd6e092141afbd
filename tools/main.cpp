#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <map>

#include "base/env.hpp"
#include "bench.hpp"
#include "bench_channel.hpp"
#include "comm/secret.hpp"
#include "demo.hpp"
#include "doctor.hpp"
#include "expertwire/error.hpp"
#include "expertwire/version.hpp"
#include "launcher.hpp"
#include "models.hpp"
#include "verify.hpp"

namespace {

using namespace expertwire;
using namespace expertwire::tools;

/// What the options say, before they become a BenchOptions.
struct BenchArguments {
  BenchOptions bench;
  std::string dtype = "bf16";
  std::string output = "pool";
  std::string layout = "token-major";
  std::string weights = "dispatch";
  int hidden = 0, experts = 0, top_k = 0, tokens = 0;
  std::vector<int> sms;
  bool no_verify = false;
};

void add_bench_options(CLI::App* app, BenchArguments& a) {
  app->add_option("--ranks", a.bench.ranks,
                  "Processes to start (default: GPUs, else 2); a launcher's if any")
      ->check(CLI::Range(1, 1024));
  app->add_option("--model", a.bench.model, "Shape by model name; `expertwire models` lists them")
      ->capture_default_str();
  app->add_option("--hidden", a.hidden, "H, in place of the model's")
      ->check(CLI::Range(1, 1 << 20));
  app->add_option("--experts", a.experts, "E, in place of the model's")
      ->check(CLI::Range(1, 1 << 20));
  app->add_option("--top-k", a.top_k, "K, in place of the model's")->check(CLI::Range(1, 32));
  app->add_option("--tokens", a.tokens, "T, tokens of a rank (default 4096 for ht, 128 for ll)")
      ->check(CLI::Range(1, 1 << 24));
  app->add_option("--dtype", a.dtype, "bf16, fp16 or fp32")
      ->check(CLI::IsMember({"bf16", "fp16", "fp32"}))
      ->capture_default_str();
  app->add_option("--routing", a.bench.routing,
                  "uniform, balanced, lognormal:S, powerlaw:A, zipf:S, hotrank:P, grouped:N,K, "
                  "masked:P or trace:FILE")
      ->capture_default_str();
  app->add_option("--iters", a.bench.iterations)
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app->add_option("--warmup", a.bench.warmup)
      ->check(CLI::Range(0, 1'000'000))
      ->capture_default_str();
  app->add_option("--lanes", a.bench.lanes)->check(CLI::Range(1, 8))->capture_default_str();
  app->add_option("--threads", a.bench.threads, "Threads of a rank (default: cores / ranks)")
      ->check(CLI::Range(1, 1024));
  app->add_option("--seed", a.bench.seed)->capture_default_str();
  app->add_option("--weights", a.weights, "When top-k weights travel")
      ->check(CLI::IsMember({"dispatch", "combine", "none"}))
      ->capture_default_str();
  app->add_option("--device", a.bench.device, "cpu, cuda, or auto: cuda where every rank has a GPU")
      ->capture_default_str();
  app->add_option("--sms", a.sms,
                  "CUDA: SMs of a rank (default: all it has); several, 8,16,24, are a sweep")
      ->delimiter(',')
      ->check(CLI::Range(0, 1024));
  app->add_flag("--tune", a.bench.tune, "CUDA: hold what follows by formula against a sweep");
  app->add_flag("--fp8", a.bench.fp8,
                "Rows travel as fp8_e4m3 with scales: ll casts them, ht is given them");
  app->add_flag("--trace", a.bench.trace, "CUDA: also print when blocks did what");
  app->add_option("--late", a.bench.late_us,
                  "Also time operations to which rank 1 comes so late, e.g. 1ms or 300us")
      ->transform(
          CLI::AsNumberWithUnit(std::map<std::string, double>{{"us", 1}, {"ms", 1e3}, {"s", 1e6}}))
      ->check(CLI::Range(0.0, 1e7));
  app->add_option("--json", a.bench.json, "Also write the results to this file");
  app->add_option("--peer", a.bench.peer, "Compare in the same run: mpi (CPU, ht) or nccl (CUDA)")
      ->check(CLI::IsMember({"mpi", "nccl"}));
  app->add_flag("--no-verify", a.no_verify, "Do not compare values with the reference");
}

BenchOptions finish(const BenchArguments& a, bool high_throughput) {
  using Weights = reference::RoundTripOptions::Weights;
  static const std::map<std::string, Weights> kWeights = {
      {"dispatch", Weights::dispatch}, {"combine", Weights::combine}, {"none", Weights::none}};
  static const std::map<std::string, DType> kDTypes = {
      {"bf16", DType::bf16}, {"fp16", DType::fp16}, {"fp32", DType::fp32}};
  BenchOptions bench = a.bench;
  bench.high_throughput = high_throughput;
  const ModelShape& model = find_model(bench.model);
  if (a.hidden > 0 || a.experts > 0 || a.top_k > 0) bench.model = "custom";
  bench.shape = {a.hidden > 0 ? a.hidden : model.hidden, a.experts > 0 ? a.experts : model.experts,
                 a.top_k > 0 ? a.top_k : model.top_k,
                 a.tokens > 0 ? a.tokens : (high_throughput ? 4096 : 128), kDTypes.at(a.dtype)};
  bench.output = a.output == "owned" ? HighThroughput::Output::owned : HighThroughput::Output::pool;
  if (a.layout == "expert-major") {
    bench.layout = HighThroughput::Layout::expert_major;
    bench.output = HighThroughput::Output::owned;  // which is all that there is
  }
  bench.weights = kWeights.at(a.weights);
  if (high_throughput && bench.weights == Weights::combine)
    throw std::invalid_argument("--weights combine is for ll; ht takes dispatch or none");
  bench.verify = !a.no_verify;
  if (a.sms.size() == 1) bench.sms = a.sms.front();
  if (a.sms.size() > 1) bench.sweep = a.sms;
  return bench;
}

int run(int argc, char** argv) {
  const std::vector<std::string> command = own_command(argc, argv);
  CLI::App app{"expertwire moves tokens between the ranks of Mixture-of-Experts layers"};
  app.set_version_flag("--version", fmt::format("expertwire {}", kVersion));
  app.require_subcommand(1);
  int status = 0;

  CLI::App* bench = app.add_subcommand("bench", "Measure dispatch and combine");
  bench->require_subcommand(1);
  BenchArguments high, low;
  CLI::App* ht = bench->add_subcommand("ht", "High throughput (training, prefill)");
  add_bench_options(ht, high);
  ht->add_option("--output", high.output, "Where rows are left")
      ->check(CLI::IsMember({"pool", "owned"}))
      ->capture_default_str();
  ht->add_option("--layout", high.layout, "token-major, or expert-major (owned output alone)")
      ->check(CLI::IsMember({"token-major", "expert-major"}))
      ->capture_default_str();
  ht->add_option("--alignment", high.bench.alignment, "Of groups, in rows, with expert-major")
      ->check(CLI::Range(1, 512))
      ->capture_default_str();
  ht->callback([&] { status = run_bench(finish(high, true), command); });
  CLI::App* ll = bench->add_subcommand("ll", "Low latency (decoding)");
  add_bench_options(ll, low);
  ll->callback([&] { status = run_bench(finish(low, false), command); });

  ChannelBenchOptions wires;
  CLI::App* channel = bench->add_subcommand("channel", "Wires, port channels and proxies");
  channel->add_option("--sizes", wires.sizes, "Bytes of a put, several separated by commas")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 28));
  channel->add_option("--wire", wires.wire, "One wire alone")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast)
      ->check(CLI::IsMember({"loopback", "shm", "ucx"}));
  channel->add_option("--seconds", wires.seconds, "About, for each figure")
      ->check(CLI::Range(0.01, 60.0))
      ->capture_default_str();
  channel->add_option("--json", wires.json, "Also write the results to this file")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  channel->callback([&] { status = run_bench_channel(wires, command); });

  VerifyOptions check;
  CLI::App* verify = app.add_subcommand("verify", "Random configurations against the reference");
  verify->add_option("--seconds", check.seconds, "How long")
      ->check(CLI::Range(0.0, 1e7))
      ->capture_default_str();
  verify->add_option("--count", check.cases, "This many cases instead")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1'000'000'000}));
  verify->add_option("--seed", check.seed)->capture_default_str();
  verify->add_option("--case", check.only, "One case, by the number that a failure printed");
  verify->add_option("--ranks", check.ranks, "Ranks of every case (default: drawn, 1 to 8)")
      ->check(CLI::Range(1, 64));
  verify->add_option("--device", check.device, "cpu, cuda, or auto: cuda where there is a GPU")
      ->capture_default_str();
  verify->add_flag("--processes", check.processes, "Ranks as processes (default 4), not threads");
  verify->callback([&] { status = run_verify(check, command); });

  DemoOptions show;
  CLI::App* demo = app.add_subcommand("demo", "One MoE layer in both modes, checked");
  demo->add_option("--ranks", show.ranks)->check(CLI::Range(1, 64))->capture_default_str();
  demo->add_option("--tokens", show.tokens, "Tokens of a rank, high throughput")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  demo->add_option("--small-tokens", show.small_tokens, "Tokens of a rank, low latency")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  demo->callback([&] { status = run_demo(show, command); });

  bool quick = false;
  CLI::App* doctor = app.add_subcommand("doctor", "What this machine has, what is wrong with it");
  doctor->add_flag("--quick", quick, "Measure nothing");
  doctor->callback([&] { status = run_doctor(!quick); });

  LaunchRequest ranks;
  CLI::App* start = app.add_subcommand("launch", "Start a program as the ranks of a job");
  start->add_option("--ranks,-n", ranks.ranks)->required()->check(CLI::Range(1, 1024));
  start->add_option("command", ranks.command, "Program and arguments, after --")->required();
  start->callback([&] { status = launch(ranks); });

  app.add_subcommand("env", "Print what every environment variable means")->callback([] {
    fmt::print("{}", environment_page());
  });
  app.add_subcommand("models", "Print the shapes that --model knows")->callback([] {
    for (const ModelShape& model : models())
      fmt::print("{:<22} hidden {:>5}  experts {:>4}  top-k {:>3}\n", model.name, model.hidden,
                 model.experts, model.top_k);
  });
  app.add_subcommand("secret", "Print a fresh secret for a job on several hosts")->callback([] {
    const std::string secret = make_secret();
    fmt::print("{}\n", to_hex(secret.data(), secret.size()));
  });

  CLI11_PARSE(app, argc, argv);
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
