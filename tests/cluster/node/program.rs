//! Programs of containers: an image stands for a program of this machine.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::{Container, EnvVar, Pod};
use kube::ResourceExt as _;
use tokio::process::Command;

use super::{fate, volumes::Files};

/// Images of model servers that are replaced by the simulator.
const MODEL_SERVERS: [&str; 2] = ["vllm-openai", "vllm"];

/// Pod, addresses and files of a container.
pub(super) struct ContainerContext<'a> {
    pub(super) pod: &'a Pod,
    pub(super) address: Ipv4Addr,
    pub(super) node: (&'a str, Ipv4Addr),
    pub(super) files: &'a Files,
}

/// Builds the command for a container. The error is a message.
pub(super) fn command(
    programs: &BTreeMap<String, PathBuf>,
    container: &Container,
    place: &ContainerContext<'_>,
) -> Result<Command, String> {
    let env = environment(container, place);
    let expand = |words: &Option<Vec<String>>| -> Vec<String> {
        words.iter().flatten().map(|word| place.files.translate(&expand(word, &env))).collect()
    };
    let (mut words, args) = (expand(&container.command), expand(&container.args));
    let image = image_name(container.image.as_deref().unwrap_or_default());
    let own = |name: &str| programs.get(name).ok_or_else(|| format!("no program for the image {name}"));
    let program = if MODEL_SERVERS.contains(&image) {
        words = stand_in(container, place);
        own("anteroom")?.clone()
    } else if words.is_empty() {
        words = args;
        own(image)?.clone()
    } else {
        let program = words.remove(0);
        words.extend(args);
        // A path inside the image: only the file name is used here.
        let name = Path::new(&program).file_name().and_then(|name| name.to_str()).unwrap_or_default();
        programs.get(name).cloned().unwrap_or_else(|| program.clone().into())
    };
    // In a real pod the process may listen on all addresses; here the pods share a network.
    if words.first().is_some_and(|word| word == "sim") && !words.iter().any(|word| word == "--host") {
        words.extend(["--host".into(), place.address.to_string()]);
    }
    let mut command = match &place.files.account {
        Some(account) => account.command(&program),
        None => Command::new(program),
    };
    command.args(words).envs(env).process_group(0);
    Ok(command)
}

/// Extracts NAME from `registry/path/NAME:tag@digest`.
fn image_name(image: &str) -> &str {
    let name = image.rsplit('/').next().unwrap_or_default();
    name.split([':', '@']).next().unwrap_or_default()
}

/// Returns the simulator's arguments for the container of a model server.
fn stand_in(container: &Container, place: &ContainerContext<'_>) -> Vec<String> {
    let port = container.ports.iter().flatten().next().map_or(8000, |port| port.container_port);
    let mut words = vec!["sim".into(), "--port".into(), port.to_string()];
    if let Some(more) = place.pod.annotations().get(fate::SIM_ARGS_ANNOTATION) {
        words.extend(more.split_whitespace().map(str::to_owned));
    }
    words
}

fn environment(container: &Container, place: &ContainerContext<'_>) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    for EnvVar { name, value, value_from } in container.env.iter().flatten() {
        let field = value_from.as_ref().and_then(|from| from.field_ref.as_ref());
        let value = match field {
            Some(field) => self::field(&field.field_path, place),
            None => expand(value.as_deref().unwrap_or_default(), &env),
        };
        env.insert(name.clone(), value);
    }
    env
}

/// Returns a field of the downward API.
fn field(path: &str, place: &ContainerContext<'_>) -> String {
    match path {
        "metadata.name" => place.pod.name_any(),
        "metadata.namespace" => place.pod.namespace().unwrap_or_default(),
        "metadata.uid" => place.pod.uid().unwrap_or_default(),
        "spec.nodeName" => place.node.0.to_owned(),
        "status.hostIP" => place.node.1.to_string(),
        "status.podIP" => place.address.to_string(),
        other => panic!("the node's agent does not know the field {other}"),
    }
}

/// Replaces `$(NAME)` by the variable's value if it exists.
fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    env.iter().fold(text.to_owned(), |text, (name, value)| text.replace(&format!("$({name})"), value))
}
