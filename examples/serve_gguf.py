"""An OpenAI server on a GGUF file, by llama.cpp (xllamacpp): python examples/serve_gguf.py FILE --port 8080."""

import argparse
import signal

import xllamacpp


def main() -> None:
    """Serves until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="as `secateur export RUN --format gguf` writes it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--context", type=int, default=2048, help="tokens, prompt and answer together")
    options = parser.parse_args()

    params = xllamacpp.CommonParams()
    params.model.path = options.file
    params.hostnames, params.port = [options.host], options.port
    params.n_ctx, params.n_parallel, params.n_gpu_layers = options.context, 1, 0
    params.verbosity = -1
    server = xllamacpp.Server(params)
    print(f"serving {options.file} at {server.listening_address}/v1", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
