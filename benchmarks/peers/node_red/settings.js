// Node-RED as a peer: no editor, no admin API, nothing written beside the flow. Environment: PEER_HTTP_PORT.
module.exports = {
    uiHost: "127.0.0.1",
    uiPort: Number(process.env.PEER_HTTP_PORT),
    httpAdminRoot: false,
    disableEditor: true,
    telemetry: { enabled: false, updateNotification: false },
    credentialSecret: false,
    externalModules: { autoInstall: false, palette: { allowInstall: false } },
    functionGlobalContext: { refusal: require("./rules.js") },
    logging: { console: { level: "warn", metrics: false, audit: false } },
};
