// A fuzzer for compilers that bring none: mutates inputs, and keeps those that reach code that no earlier one reached
// (g++ -fsanitize-coverage=trace-pc). Takes libFuzzer's flags -runs, -seed, -max_total_time and -max_len. Same seed,
// same inputs.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr size_t kPlaces = size_t{1} << 16;
uint8_t reached[kPlaces];  // by any input so far
bool fresh = false;        // whether the current input reached something new
size_t places = 0;
uintptr_t last = 0;

using Input = std::vector<uint8_t>;

int64_t flag(int argc, char** argv, const std::string& name, int64_t otherwise) {
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], (name + "=").c_str(), name.size() + 1) == 0) return std::atoll(argv[i] + name.size() + 1);
  }
  return otherwise;
}

void mutate(Input& input, const std::vector<Input>& corpus, std::mt19937_64& random, size_t most) {
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % std::max<size_t>(n, 1)); };
  constexpr uint8_t kTelling[] = {0, 1, 2, 3, 127, 128, 239, 240, 241, 242, 250, 255};
  for (size_t changes = 1 + below(4); changes > 0; --changes) {
    const size_t at = below(input.size());
    switch (below(7)) {
      case 0:
        if (!input.empty()) input[at] = static_cast<uint8_t>(random());
        break;
      case 1:
        if (!input.empty()) input[at] = kTelling[below(sizeof kTelling)];
        break;
      case 2:
        if (!input.empty()) input[at] = static_cast<uint8_t>(input[at] + static_cast<uint8_t>(below(9)) - 4);
        break;
      case 3:
        input.insert(input.begin() + static_cast<std::ptrdiff_t>(at), 1 + below(8), static_cast<uint8_t>(random()));
        break;
      case 4:
        if (!input.empty()) {
          const size_t count = std::min(input.size() - at, 1 + below(8));
          input.erase(input.begin() + static_cast<std::ptrdiff_t>(at),
                      input.begin() + static_cast<std::ptrdiff_t>(at + count));
        }
        break;
      case 5: {  // the end of another input
        const Input& other = corpus[below(corpus.size())];
        const size_t from = below(other.size());
        input.resize(at);
        input.insert(input.end(), other.begin() + static_cast<std::ptrdiff_t>(std::min(from, other.size())),
                     other.end());
        break;
      }
      default:  // a part of its own once more
        if (!input.empty()) {
          const size_t count = std::min(input.size() - at, 1 + below(16));
          const Input part(input.begin() + static_cast<std::ptrdiff_t>(at),
                           input.begin() + static_cast<std::ptrdiff_t>(at + count));
          input.insert(input.begin() + static_cast<std::ptrdiff_t>(below(input.size())), part.begin(), part.end());
        }
    }
  }
  if (input.size() > most) input.resize(most);
}

}  // namespace

// Called by the instrumented code at every branch.
extern "C" __attribute__((no_sanitize_address)) void __sanitizer_cov_trace_pc() {
  // Relative to this function: the program may lie anywhere.
  const uintptr_t here =
      reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - reinterpret_cast<uintptr_t>(&__sanitizer_cov_trace_pc);
  const size_t place = (here ^ (last << 1)) * 0x9E3779B97F4A7C15u >> 48;
  last = here;
  if (reached[place] == 0) {
    reached[place] = 1;
    fresh = true;
    ++places;
  }
}

int main(int argc, char** argv) {
  const int64_t runs = flag(argc, argv, "-runs", -1), seconds = flag(argc, argv, "-max_total_time", 0);
  const size_t most = static_cast<size_t>(flag(argc, argv, "-max_len", 512));
  std::mt19937_64 random(static_cast<uint64_t>(flag(argc, argv, "-seed", 1)));
  std::vector<Input> corpus{{0}, {1}, {2}};
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  int64_t done = 0;
  for (; (runs < 0 || done < runs) && (seconds == 0 || std::chrono::steady_clock::now() < end); ++done) {
    Input input = corpus[static_cast<size_t>(random() % corpus.size())];
    if (done >= static_cast<int64_t>(corpus.size())) mutate(input, corpus, random, most);
    fresh = false;
    last = 0;
    // A copy of just its size, so that reading beyond it is found.
    const Input exact(input.begin(), input.end());
    LLVMFuzzerTestOneInput(exact.data(), exact.size());
    if (fresh) corpus.push_back(input);
  }
  std::printf("inputs %lld kept %zu places %zu\n", static_cast<long long>(done), corpus.size(), places);
  return 0;
}
