# `cpack -G DEB` in the build folder makes libfree-transformer-dev: what `cmake --install` installs, and its documentation.
set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME libfree-transformer-dev)
set(CPACK_PACKAGE_VERSION ${PROJECT_VERSION})
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "losses of the Free Transformer for LibTorch (headers)")
set(CPACK_PACKAGE_DESCRIPTION
"Cross entropy, the free-bits KL of latent bits, and both as one VAE loss with
the figures that a training run logs, for C++ training loops on LibTorch:
header-only, with vector kernels and gradients of high relative accuracy.

LibTorch is Debian's libtorch-dev, or that of a Python wheel.")
set(CPACK_PACKAGE_CONTACT "The free_transformer authors <authors@free-transformer.invalid>"
    CACHE STRING "Maintainer of the Debian package: name and address")
set(CPACK_STRIP_FILES OFF)

set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_RELEASE 1)
set(CPACK_DEBIAN_PACKAGE_ARCHITECTURE all)
set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_PACKAGE_RECOMMENDS libtorch-dev)  # no more than that: a wheel takes its place
set(CPACK_DEBIAN_PACKAGE_SUGGESTS cmake)
set(CPACK_DEBIAN_COMPRESSION_TYPE xz)
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)
set(CPACK_INSTALL_DEFAULT_DIRECTORY_PERMISSIONS
    OWNER_READ OWNER_WRITE OWNER_EXECUTE GROUP_READ GROUP_EXECUTE WORLD_READ WORLD_EXECUTE)

# Debian has names for these files; `cmake --install` leaves them out.
set(documentation_folder ${CMAKE_INSTALL_DATADIR}/doc/${CPACK_PACKAGE_NAME})
string(TIMESTAMP date "%a, %d %b %Y %H:%M:%S +0000" UTC)
configure_file(${CMAKE_CURRENT_LIST_DIR}/changelog.in changelog.Debian @ONLY)
install(FILES LICENSE DESTINATION ${documentation_folder} RENAME copyright COMPONENT debian EXCLUDE_FROM_ALL)
install(FILES README.md DESTINATION ${documentation_folder} COMPONENT debian EXCLUDE_FROM_ALL)
install(DIRECTORY docs DESTINATION ${documentation_folder} COMPONENT debian EXCLUDE_FROM_ALL)
function(install_compressed file name)
  set(to "\$ENV{DESTDIR}\${CMAKE_INSTALL_PREFIX}/${documentation_folder}/${name}")
  install(CODE "execute_process(COMMAND gzip -9nc \"${file}\" OUTPUT_FILE \"${to}\" COMMAND_ERROR_IS_FATAL ANY)"
          COMPONENT debian EXCLUDE_FROM_ALL)
endfunction()
install_compressed(${CMAKE_CURRENT_BINARY_DIR}/changelog.Debian changelog.Debian.gz)
install_compressed(${PROJECT_SOURCE_DIR}/CHANGELOG.md changelog.gz)

foreach(component Unspecified debian)
  list(APPEND CPACK_INSTALL_CMAKE_PROJECTS ${PROJECT_BINARY_DIR} ${PROJECT_NAME} ${component} /)
endforeach()

include(CPack)
