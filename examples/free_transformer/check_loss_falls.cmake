# Runs a short training, and fails unless its loss has clearly fallen: cmake -D PROGRAM=… -P check_loss_falls.cmake
execute_process(COMMAND ${PROGRAM} --steps 40 --minutes 0 --evaluation-batches 4 --sample-bytes 100 --output-folder loss_falls
                COMMAND_ERROR_IS_FATAL ANY)

file(STRINGS loss_falls/training_log.csv rows)
list(POP_FRONT rows header)
string(REPLACE "," ";" header "${header}")
list(FIND header "loss/total" column)

foreach(row IN LISTS rows)
  string(REPLACE "," ";" row "${row}")
  list(GET row ${column} loss)
  # CMake counts in integers: thousandths of a nat.
  string(REGEX REPLACE "^([0-9]+)\\.?([0-9]?[0-9]?[0-9]?).*" "\\1;\\2000" loss "${loss}")
  list(POP_FRONT loss whole)
  string(SUBSTRING ${loss} 0 3 part)
  list(APPEND losses ${whole}${part})
endforeach()

list(GET losses 0 first)
list(GET losses -1 last)
message("loss/total fell from ${first} to ${last} thousandths of a nat")
math(EXPR bound "${first} * 9 / 10")
if(NOT last LESS bound)
  message(FATAL_ERROR "The loss did not fall by a tenth: ${losses}")
endif()
