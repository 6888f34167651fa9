// Compiled as the wheel is: a string here is a string there.
#include <string>

static_assert(_GLIBCXX_USE_CXX11_ABI == 0);

int main() { return std::string().empty() ? 0 : 1; }
