// A program that only a build which ignores undefined behaviour ends well.

#include <climits>

int main(int argc, char**) {
  volatile int large = INT_MAX;
  large = large + argc;
  return 0;
}
