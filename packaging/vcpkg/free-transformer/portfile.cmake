# An overlay port: it installs the clone that it lies in. For a registry, vcpkg_from_github or the like goes here.
cmake_path(SET SOURCE_PATH NORMALIZE "${CURRENT_PORT_DIR}/../../..")

set(VCPKG_BUILD_TYPE release) # headers alone
vcpkg_cmake_configure(
    SOURCE_PATH "${SOURCE_PATH}"
    OPTIONS
        -DFREE_TRANSFORMER_BUILD_TESTS=OFF
        -DFREE_TRANSFORMER_BUILD_EXAMPLES=OFF
)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(PACKAGE_NAME free_transformer CONFIG_PATH share/cmake/free_transformer)

file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/share/cmake")
file(INSTALL "${CURRENT_PORT_DIR}/usage" DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
