# `just` lists these. Each is one command of CONTRIBUTING.md; nothing needs `just`.

# List the recipes.
default:
    @just --list

# Compile, lint and check the format.
check:
    cargo clippy --workspace --all-targets -- -D warnings
    cargo fmt --all --check

# Run the tests, or those whose names contain a filter.
test *ARGS:
    cargo test --workspace {{ ARGS }}

# Show a cold start end to end.
demo *ARGS:
    cargo run --release -- demo {{ ARGS }}

# Run parts of the checks, or all of them.
ci *PARTS:
    .ci/run {{ PARTS }}

# Fuzz a target: just fuzz route_match -max_total_time=300
fuzz TARGET *OPTIONS:
    fuzz/run {{ TARGET }} {{ OPTIONS }}

# Regenerate the reference of the configuration, the schemas and the ModelRoute definition.
docs:
    UPDATE_DOCS=1 cargo test --test config
    UPDATE_DOCS=1 cargo test --lib kube::model_route

# Build the files of a release into target/dist.
dist:
    .ci/dist
