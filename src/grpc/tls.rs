//! TLS with certificates that can be replaced at run time.

use std::{fs, io, sync::Arc};

use parking_lot::Mutex;
use thiserror::Error;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject},
        server::WebPkiClientVerifier,
    },
};

use crate::config::ScalerTls;

/// Certificate of the server and CA of its clients, from files. They are read again for every connection, of which
/// there are few, so that replacing them (cert-manager does, weeks before expiry) needs no notification.
pub struct Tls {
    files: ScalerTls,
    loaded: Mutex<LoadedTls>,
}

struct LoadedTls {
    contents: TlsFileContents,
    config: Arc<ServerConfig>,
}

#[derive(PartialEq, Eq)]
struct TlsFileContents {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

/// Reason why TLS cannot be used. Messages begin with the key that names the file.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each variant's text says what it is")]
pub enum TlsError {
    #[error("scalerTls.{key}: cannot read {file}: {source}")]
    Read { key: &'static str, file: String, source: io::Error },
    #[error("scalerTls.{key}: {file} is not PEM: {source}")]
    Pem { key: &'static str, file: String, source: pem::Error },
    #[error("scalerTls.{key}: {file} has no certificate in PEM form (-----BEGIN CERTIFICATE-----)")]
    Empty { key: &'static str, file: String },
    #[error("scalerTls.clientCa: {file} cannot be used: {reason}")]
    ClientCa { file: String, reason: String },
    #[error("scalerTls.cert and scalerTls.key: {cert} and {key} cannot be used together: {source}")]
    Pair { cert: String, key: String, source: rustls::Error },
}

// === impl Tls ===

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// The files cannot be used.
    pub fn load(files: ScalerTls) -> Result<Self, TlsError> {
        let contents = TlsFileContents::read(&files)?;
        let config = contents.config(&files)?;
        Ok(Self { files, loaded: Mutex::new(LoadedTls { contents, config }) })
    }

    /// Returns an acceptor for the current files. If these cannot be used, the previous ones remain in effect.
    pub(super) async fn acceptor(self: &Arc<Self>) -> TlsAcceptor {
        let tls = self.clone();
        // Fails only when the runtime shuts down.
        let refreshed = tokio::task::spawn_blocking(move || tls.refresh()).await;
        if let Ok(Err(error)) = refreshed {
            tracing::warn!(%error, "the changed files of scalerTls cannot be used; keeping the previous ones");
        }
        TlsAcceptor::from(self.loaded.lock().config.clone())
    }

    fn refresh(&self) -> Result<(), TlsError> {
        let contents = TlsFileContents::read(&self.files)?;
        if contents == self.loaded.lock().contents {
            return Ok(());
        }
        let config = contents.config(&self.files)?;
        *self.loaded.lock() = LoadedTls { contents, config };
        tracing::info!(cert = self.files.cert, "the certificate of the scaler was replaced");
        Ok(())
    }
}

// === impl TlsFileContents ===

impl TlsFileContents {
    fn read(files: &ScalerTls) -> Result<Self, TlsError> {
        let read = |key, file: &String| {
            fs::read(file).map_err(|source| TlsError::Read { key, file: file.clone(), source })
        };
        Ok(Self {
            cert: read("cert", &files.cert)?,
            key: read("key", &files.key)?,
            client_ca: files.client_ca.as_ref().map(|file| read("clientCa", file)).transpose()?,
        })
    }

    fn config(&self, files: &ScalerTls) -> Result<Arc<ServerConfig>, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let chain = certificates("cert", &files.cert, &self.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|source| TlsError::Pem {
            key: "key",
            file: files.key.clone(),
            source,
        })?;
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|source| files.pair(source))?;
        let builder = match (&self.client_ca, &files.client_ca) {
            (Some(authorities), Some(file)) => {
                let unusable = |reason: String| TlsError::ClientCa { file: file.clone(), reason };
                let mut roots = RootCertStore::empty();
                for authority in certificates("clientCa", file, authorities)? {
                    roots.add(authority).map_err(|error| unusable(error.to_string()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
                    .build()
                    .map_err(|error| unusable(error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|source| files.pair(source))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

impl ScalerTls {
    fn pair(&self, source: rustls::Error) -> TlsError {
        TlsError::Pair { cert: self.cert.clone(), key: self.key.clone(), source }
    }
}

fn certificates(
    key: &'static str,
    file: &str,
    text: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(text)
        .collect::<Result<_, _>>()
        .map_err(|source| TlsError::Pem { key, file: file.into(), source })?;
    if found.is_empty() {
        return Err(TlsError::Empty { key, file: file.into() });
    }
    Ok(found)
}
