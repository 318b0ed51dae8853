//! Generated from `proto/externalscaler.proto`.

tonic::include_proto!("externalscaler");
