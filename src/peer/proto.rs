//! Protocol, generated from `proto/peers.proto`.

tonic::include_proto!("anteroom.peers.v1");
