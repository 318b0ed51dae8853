//! Certificates of a cluster. The client certificate of a user authenticates as that user.

use std::{net::IpAddr, path::Path};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::{Value, json};

/// Certificate authority.
pub(crate) struct CertificateAuthority {
    issuer: Issuer<'static, KeyPair>,
    /// Certificate of the authority.
    pub(crate) pem: String,
}

/// Certificate and key, as PEM.
pub(crate) struct Identity {
    pub(crate) cert: String,
    pub(crate) key: String,
}

// === impl CertificateAuthority ===

impl CertificateAuthority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Issues a certificate for a server with these addresses and names.
    pub(crate) fn server(&self, name: &str, addresses: &[IpAddr], names: &[&str]) -> Identity {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.subject_alt_names = addresses.iter().map(|&address| SanType::IpAddress(address)).collect();
        params.subject_alt_names.extend(names.iter().map(|&name| SanType::DnsName(name.try_into().unwrap())));
        self.sign(params)
    }

    /// Issues a client certificate; for an apiserver it names a user and a group.
    pub(crate) fn client(&self, user: &str, group: Option<&str>) -> Identity {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params)
    }

    fn sign(&self, mut params: CertificateParams) -> Identity {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().unwrap();
        Identity { cert: params.signed_by(&key, &self.issuer).unwrap().pem(), key: key.serialize_pem() }
    }

    /// Builds a kubeconfig, as JSON, for a user of the apiserver at `server`.
    pub(crate) fn kubeconfig(&self, server: &str, user: &str, group: Option<&str>) -> String {
        let identity = self.client(user, group);
        let user = json!({
            "client-certificate-data": base64(&identity.cert),
            "client-key-data": base64(&identity.key),
        });
        self.kubeconfig_of(server, &user)
    }

    /// Same as [`Self::kubeconfig`], with other credentials.
    pub(crate) fn kubeconfig_of(&self, server: &str, user: &Value) -> String {
        let named = |key: &str, value| json!([{ "name": "it", key: value }]);
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": named("cluster", json!({ "server": server, "certificate-authority-data": base64(&self.pem) })),
            "users": named("user", user.clone()),
            "contexts": named("context", json!({ "cluster": "it", "user": "it" })),
            "current-context": "it",
        })
        .to_string()
    }
}

// === impl Identity ===

impl Identity {
    /// Writes `NAME.crt` and `NAME.key`.
    pub(crate) fn write(&self, folder: &Path, name: &str) {
        std::fs::write(folder.join(format!("{name}.crt")), &self.cert).unwrap();
        std::fs::write(folder.join(format!("{name}.key")), &self.key).unwrap();
    }
}

/// Writes the key pair that signs the tokens of service accounts, as `sa.key` and `sa.pub`.
pub(crate) fn write_token_keys(folder: &Path) {
    let key = KeyPair::generate().unwrap();
    std::fs::write(folder.join("sa.key"), key.serialize_pem()).unwrap();
    std::fs::write(folder.join("sa.pub"), key.public_key_pem()).unwrap();
}

fn base64(text: &str) -> String {
    // `ByteString` is the JSON encoding of bytes in Kubernetes' own types.
    let bytes = k8s_openapi::ByteString(text.as_bytes().to_vec());
    serde_json::to_value(bytes).unwrap().as_str().unwrap().to_owned()
}
