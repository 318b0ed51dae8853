//! Compiles the protocols, without `protoc`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["externalscaler.proto", "peers.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .file_descriptor_set_path(std::path::Path::new(&std::env::var("OUT_DIR")?).join("protocols.bin"))
        .compile_fds(files)?;
    Ok(())
}
