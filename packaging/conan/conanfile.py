"""conan create packaging/conan: the headers and their CMake package, beside a LibTorch that is not Conan's."""

import re
from pathlib import Path

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.cmake import CMake, CMakeToolchain, cmake_layout
from conan.tools.files import copy, load

required_conan_version = ">=2.0"


class FreeTransformer(ConanFile):
    name = "free_transformer"
    description = "Losses of the Free Transformer for training loops on LibTorch"
    license = "MIT"
    topics = ("pytorch", "libtorch", "loss", "cross-entropy", "vae", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"

    @property
    def _repository(self):
        return Path(self.recipe_folder).parents[1]

    def set_version(self):
        header = load(self, self._repository / "include/free_transformer/version.hpp")
        self.version = ".".join(re.findall(r"_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header))

    def export_sources(self):
        for pattern in ("CMakeLists.txt", "LICENSE", "cmake/*", "include/*", "packaging/debian/*"):
            copy(self, pattern, self._repository, self.export_sources_folder)

    def validate(self):
        check_min_cppstd(self, 17)

    def layout(self):
        cmake_layout(self)

    def generate(self):
        toolchain = CMakeToolchain(self)
        toolchain.cache_variables["FREE_TRANSFORMER_BUILD_TESTS"] = False
        toolchain.cache_variables["FREE_TRANSFORMER_BUILD_EXAMPLES"] = False
        toolchain.generate()

    def build(self):
        CMake(self).configure()

    def package(self):
        CMake(self).install()
        copy(self, "LICENSE", self.source_folder, Path(self.package_folder) / "licenses")

    def package_id(self):
        self.info.clear()

    def package_info(self):
        # The package's own configuration finds LibTorch; one written by Conan would not know it.
        self.cpp_info.set_property("cmake_find_mode", "none")
        self.cpp_info.builddirs = ["share/cmake/free_transformer"]
        self.cpp_info.bindirs = self.cpp_info.libdirs = []
