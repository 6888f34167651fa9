include(CMakePackageConfigHelpers)
set(package_folder ${CMAKE_INSTALL_DATADIR}/cmake/free_transformer)

write_basic_package_version_file(free_transformerConfigVersion.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(DIRECTORY include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS free_transformer EXPORT free_transformerTargets)
install(EXPORT free_transformerTargets NAMESPACE free_transformer:: DESTINATION ${package_folder})
install(FILES cmake/FindLibTorch.cmake cmake/free_transformerConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/free_transformerConfigVersion.cmake
        DESTINATION ${package_folder})
