//! Compiles the protocols, without `protoc`.

use std::{env, error::Error, fs, path::Path};

use protox::Compiler;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let mut compiler = Compiler::new(["proto"])?;
    compiler.include_imports(true).open_files(["externalscaler.proto", "peers.proto"])?;
    // For reflection.
    fs::write(Path::new(&env::var("OUT_DIR")?).join("protocols.bin"), compiler.encode_file_descriptor_set())?;
    let services = tonic_prost_build::configure().codec_path("crate::grpc::SmallBufferCodec");
    services.compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
