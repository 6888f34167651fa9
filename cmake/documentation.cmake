# Target `docs`: the public headers as HTML in the build folder. A comment that Doxygen cannot follow is an error.
find_package(Doxygen REQUIRED)

set(DOXYGEN_PROJECT_BRIEF ${PROJECT_DESCRIPTION})
set(DOXYGEN_PROJECT_NUMBER ${PROJECT_VERSION})
set(DOXYGEN_WARN_AS_ERROR FAIL_ON_WARNINGS)
set(DOXYGEN_QUIET YES)
set(DOXYGEN_WARN_NO_PARAMDOC NO)
set(DOXYGEN_EXTRACT_ALL YES)
set(DOXYGEN_JAVADOC_AUTOBRIEF YES)
set(DOXYGEN_STRIP_FROM_INC_PATH ${PROJECT_SOURCE_DIR}/include)
set(DOXYGEN_SORT_MEMBER_DOCS NO)
set(DOXYGEN_GENERATE_LATEX NO)

# An option is a field for the reader, though LibTorch's macro also makes its setter.
set(DOXYGEN_MACRO_EXPANSION YES)
set(DOXYGEN_EXPAND_ONLY_PREDEF YES)
set(DOXYGEN_PREDEFINED "TORCH_ARG(T,name)=T name")

# The headers are written for the eye; what Doxygen needs beside that is put in on the way.
set(DOXYGEN_INPUT_FILTER "sed -E -f ${CMAKE_CURRENT_LIST_DIR}/doxygen_comments.sed")

file(CONFIGURE OUTPUT mainpage.md CONTENT
     "# @PROJECT_NAME@ {#mainpage}\n@PROJECT_DESCRIPTION@: [every function](namespacemembers_func.html), [every header](files.html).\n")
file(GLOB public_headers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/include/free_transformer/*.hpp)
doxygen_add_docs(docs ${public_headers} ${CMAKE_CURRENT_BINARY_DIR}/mainpage.md WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
                 COMMENT "Writing ${PROJECT_BINARY_DIR}/html/index.html")
