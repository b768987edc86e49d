# `make demo` and `make test` are the README's two commands; `make lint` is what CI checks first.
