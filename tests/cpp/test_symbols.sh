#!/bin/sh
# What the linker may and may not find in the compiled files.
#
#   test_symbols.sh kernels baseline a.o b.o -- avx2 c.o d.o -- ...
#       A kernel object defines nothing that the linker could take for code compiled elsewhere: of
#       two equal functions (weak symbols: inline functions, templates) it keeps either, and an
#       older processor would meet instructions that it does not know. So all symbols of other
#       linkage than local stand in the namespace of their instruction set.
#   test_symbols.sh library libkinml_ops.so
#       No Python, no executable stack, and every undefined symbol is found.
#
# Prints every fault and 'N passed, N failed'; exit status 1 if there is one, 77 (skipped) without nm.
set -u
passed=0
failed=0
check() { # description, faults (empty: good)
  if [ -z "$2" ]; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    printf '%s:\n%s\n' "$1" "$2"
  fi
}

for tool in nm readelf ldd; do
  command -v "$tool" >/dev/null || { echo "skipped: no $tool"; exit 77; }
done

kind=$1
shift
case $kind in
kernels)
  isa=
  for word in "$@"; do
    if [ "$word" = -- ]; then
      isa=
    elif [ -z "$isa" ]; then
      isa=$word
    else
      symbols=$(nm -C --defined-only "$word") || exit 1
      # Not local: upper-case types, and u, v, w. Guards, tables of types and the like carry a prefix.
      foreign=$(printf '%s\n' "$symbols" | grep -E '^[0-9a-f]* [A-Zuvw] ' |
        grep -vE "^[0-9a-f]* [A-Zuvw] ((guard variable|typeinfo|typeinfo name|vtable|TLS init function|TLS wrapper function) for )?([a-z ]+ )?kinml::$isa::")
      check "$word defines symbols outside of kinml::$isa" "$foreign"
      own=$(printf '%s\n' "$symbols" | grep -cE "^[0-9a-f]* T kinml::$isa::")
      check "$word" "$([ "$own" -gt 0 ] || echo "has no kernel in kinml::$isa")"
    fi
  done
  ;;
library)
  library=$1
  check "$library is a Python module" "$(nm -D --defined-only "$library" | grep PyInit)"
  check "$library calls Python" "$(nm -D --undefined-only "$library" | grep -E ' _?Py[A-Z_]')"
  check "$library needs Python" "$(readelf -d "$library" | grep NEEDED | grep -i python)"
  check "$library has an OpenMP runtime of its own" "$(readelf -d "$library" | grep NEEDED | grep -E 'gomp|omp5')"
  check "$library" "$(readelf -lW "$library" | grep -q GNU_STACK || echo 'does not say that its stack is not executable')"
  check "$library has an executable stack" "$(readelf -lW "$library" | grep GNU_STACK | grep E)"
  check "$library has text relocations" "$(readelf -d "$library" | grep TEXTREL)"
  check "$library misses libraries or symbols" "$(ldd -r "$library" 2>&1 | grep -E 'not found|undefined symbol')"
  ;;
*)
  echo "test_symbols.sh kernels ISA OBJECT... [-- ISA OBJECT...] | library FILE"
  exit 2
  ;;
esac

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
