# What Doxygen needs beside a public header that is written for the eye, line by line: sed -E -f doxygen_comments.sed

# The first comment is about the file. The line that this adds goes again with the pragma, so that warnings name the right lines.
1s,^/// ,/// @file\n/// ,
/^#pragma once$/d

# Nothing in detail is API, nor is a specialization, which ends with the first line that ends a statement or a body.
/^namespace (detail|FREE_TRANSFORMER_DETAIL) \{$/,/^\}  \/\/ namespace (detail|FREE_TRANSFORMER_DETAIL)$/s/.*//
/^template <>$/,/[;}]$/s/.*//
# A namespace whose name is a macro keeps copies of the library apart, and is not written by a user.
/^(inline namespace [A-Z_]+ \{|\}  \/\/ namespace [A-Z_]+)$/s/.*//

# An indented line is an equation, or a name in a table and what it is.
s,^( *///) {5}([^ ].*)$,\1 <div>`\2`</div>,
# A name, a gap, and what there is to say of it.
s,^( *///) ([A-Za-z_]+(\, [A-Za-z_]+)*)  +(.*)$,\1 <br><b>\2</b>\&emsp;\4,
