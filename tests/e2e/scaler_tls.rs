//! TLS of the scaler: client authentication, and certificate rotation.

use std::{fs, path::Path};

use anteroom::app::BoundProxy;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

use super::scaler::{Scaler, tiny};
use crate::support::{
    TestProxy,
    proxy::{options, parse},
    route, routes, soon,
};

pub struct ScalerAuthority(CertifiedIssuer<'static, KeyPair>);

impl ScalerAuthority {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// Issues a certificate and key for this name and purpose.
    pub fn issue(&self, name: &str, purpose: ExtendedKeyUsagePurpose) -> (String, String) {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    fn serve(&self, folder: &Path) {
        let (cert, key) = self.issue("anteroom.test", ExtendedKeyUsagePurpose::ServerAuth);
        fs::write(folder.join("tls.crt"), cert).unwrap();
        fs::write(folder.join("tls.key"), key).unwrap();
    }
}

fn config(folder: &Path, client_ca: bool) -> String {
    let file = |name: &str| folder.join(name).display().to_string();
    let client_ca =
        if client_ca { format!(", clientCa: \"{}\"", file("client-ca.crt")) } else { String::new() };
    format!(
        "scaler: 127.0.0.1:0\nscalerTls: {{ cert: \"{}\", key: \"{}\"{client_ca} }}\n{}",
        file("tls.crt"),
        file("tls.key"),
        routes(&[route("tiny", "http://127.0.0.1:9", "")])
    )
}

/// Calls the scaler with this trusted authority and client certificate; returns true if the call succeeds.
async fn ask(proxy: &TestProxy, authority: &str, identity: Option<(String, String)>) -> bool {
    let mut tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authority)).domain_name("anteroom.test");
    if let Some((cert, key)) = identity {
        tls = tls.identity(Identity::from_pem(cert, key));
    }
    let uri = format!("https://{}", proxy.scaler.unwrap());
    let endpoint = Channel::from_shared(uri).unwrap().tls_config(tls).unwrap();
    let asked = async {
        let mut scaler = Scaler::new(endpoint.connect().await.ok()?);
        // In TLS 1.3 a client learns of its rejection only after its first message.
        scaler.is_active(tiny()).await.ok()
    };
    soon("an answer or a refusal", asked).await.is_some()
}

#[tokio::test]
async fn certificates_are_replaced_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (ScalerAuthority::new("first"), ScalerAuthority::new("second"));
    first.serve(folder.path());
    let proxy = TestProxy::start(&config(folder.path(), false)).await;
    assert!(ask(&proxy, &first.pem(), None).await);
    assert!(!ask(&proxy, &second.pem(), None).await, "another authority");
    fs::write(folder.path().join("tls.crt"), "half writ").unwrap();
    assert!(ask(&proxy, &first.pem(), None).await, "what was there before stays");
    second.serve(folder.path());
    assert!(ask(&proxy, &second.pem(), None).await);
    assert!(!ask(&proxy, &first.pem(), None).await);
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn client_ca_requires_a_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let (server, clients, others) =
        (ScalerAuthority::new("server"), ScalerAuthority::new("clients"), ScalerAuthority::new("others"));
    server.serve(folder.path());
    fs::write(folder.path().join("client-ca.crt"), clients.pem()).unwrap();
    let proxy = TestProxy::start(&config(folder.path(), true)).await;
    let keda =
        |authority: &ScalerAuthority| Some(authority.issue("keda", ExtendedKeyUsagePurpose::ClientAuth));
    assert!(ask(&proxy, &server.pem(), keda(&clients)).await);
    assert!(!ask(&proxy, &server.pem(), None).await);
    assert!(!ask(&proxy, &server.pem(), keda(&others)).await);
    proxy.stop(&[]).await;
}

#[tokio::test]
async fn unusable_tls_files_fail_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let start = async || {
        BoundProxy::new(parse(&config(folder.path(), false)), options()).await.err().unwrap().to_string()
    };
    let error = start().await;
    assert!(error.starts_with("scalerTls.cert: cannot read") && error.contains("tls.crt"), "{error}");
    let authority = ScalerAuthority::new("first");
    authority.serve(folder.path());
    fs::write(folder.path().join("tls.crt"), "").unwrap();
    let error = start().await;
    assert!(error.contains("scalerTls.cert") && error.contains("has no certificate in PEM form"), "{error}");
    let (cert, _) = authority.issue("anteroom.test", ExtendedKeyUsagePurpose::ServerAuth);
    fs::write(folder.path().join("tls.crt"), cert).unwrap();
    let error = start().await;
    assert!(error.contains("scalerTls.key") && error.contains("cannot be used together"), "{error}");
    fs::write(folder.path().join("tls.key"), "no key").unwrap();
    let error = start().await;
    assert!(error.starts_with("scalerTls.key:") && error.contains("is not PEM"), "{error}");
}
